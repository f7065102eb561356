"""Files in tar archives that others made: none is lost in silence, no claimed size is believed.

Python's tarfile takes a damaged header for the end of an archive, and fills the holes of sparse
files with zeros in memory. Here only zeros may follow the last member, and each file lies in the
archive as it is: `size` bytes at `offset_data`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_MAX_HEADER_BYTES = 1 << 20  # of a long name or of PAX records
_HEADER_TYPES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
_CHUNK = 1 << 20


class _Header(tarfile.TarInfo):
    """A header whose claims are checked before tarfile acts on them."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{header.name!r} is a sparse file")
        if header.size < 0 or (header.type in _HEADER_TYPES and header.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"the header of {header.name!r} claims {header.size} bytes")
        return header


def tar_files(stream: IO[bytes], path: str | Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed archive, in order; directories and links are left out.

    ValueError naming `path`, after the files that could be found, if the archive is damaged, cut
    short or compressed, or if a file is sparse or claims more bytes than there are. The stream may
    be moved in between.
    """
    num_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header, errors="strict") as tar:
            for file in tar:
                if file.issparse() or not 0 <= file.size <= num_bytes - file.offset_data:
                    what = "is a sparse file" if file.issparse() else f"claims {file.size} bytes"
                    raise tarfile.ReadError(f"{file.name!r} {what}")
                if file.isfile():
                    yield file
            _check_end(stream, tar.offset)
    except (
        tarfile.TarError, EOFError, ValueError, LookupError, ArithmeticError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} is cut short, damaged or not a plain tar ({error}); copy or write it again"
        ) from error


def _check_end(stream: IO[bytes], offset: int) -> None:
    """ReadError unless the archive's end mark lies at `offset`: zeros, as far as it goes."""
    stream.seek(offset)
    num_zeros = 0
    while chunk := stream.read(_CHUNK):
        if chunk.count(0) != len(chunk):
            raise tarfile.ReadError(f"no header at byte {offset}, but there is more behind it")
        num_zeros += len(chunk)
    if num_zeros < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"its end mark is missing at byte {offset}")
