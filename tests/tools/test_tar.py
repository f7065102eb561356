"""Archives that others made: damaged, cut short or with sizes that are not true."""

import io
import tarfile

import pytest
from data.made import encoded, write

from memseg_dist.tools.external import index_external
from memseg_dist.tools.tar import tar_files
from memseg_dist.tools.verify import verify


def made(*files, format=tarfile.USTAR_FORMAT):
    """A tar of (name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def listed(content):
    return [file.name for file in tar_files(io.BytesIO(content), "a.tar")]


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


FILES = [(f"{number}.txt", b"x" * 700) for number in range(4)]  # 3 blocks each
END = 4 * 3 * 512


def test_whole_archives_of_all_formats():
    long = "folder/" * 40 + "picture.jpg"
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = [name for name, _ in FILES]
        assert listed(made(*FILES, format=format)) == names
        if format != tarfile.USTAR_FORMAT:
            assert listed(made((long, b"1"), *FILES, format=format)) == [long, *names]
    assert listed(made(*FILES)[: END + 512]) == names  # of the end mark one block is enough


def test_no_cut_is_taken_for_the_end():
    for length in [*range(0, END, 97), *range(512, END + 512, 512), END + 511]:
        with pytest.raises(ValueError, match=r"^a\.tar is cut short, damaged or not a plain tar"):
            listed(made(*FILES)[:length])


@pytest.mark.parametrize("number", range(4))
def test_one_bit_of_a_header_is_not_taken_for_the_end(number):
    for position in (0, 130, 150, 156, 511):
        with pytest.raises(ValueError, match=r"^a\.tar is cut short, damaged or not a plain tar"):
            listed(flipped(made(*FILES), number * 3 * 512 + position))


def test_what_follows_the_end_is_not_lost():
    with pytest.raises(ValueError, match=r"no header at byte 6144, but there is more behind it"):
        listed(made(*FILES) + made(*FILES))


@pytest.mark.parametrize("kind", ["GNU", "PAX", "PAX size", "negative", "long name"])
def test_what_claims_more_than_there_is_is_refused_before_it_is_read(kind):
    header = tarfile.TarInfo("a.jpg")
    header.size, format = 0, tarfile.PAX_FORMAT
    if kind == "GNU":
        header.type, format = tarfile.GNUTYPE_SPARSE, tarfile.GNU_FORMAT
    elif kind == "PAX":
        header.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(13 << 30)}
    elif kind == "PAX size":
        header.pax_headers = {"size": str(13 << 30)}
    elif kind == "negative":
        header.pax_headers = {"size": "-1024"}  # tarfile would read the same header for ever
    else:
        header.type, header.size, format = tarfile.GNUTYPE_LONGNAME, 13 << 30, tarfile.GNU_FORMAT
    content = header.tobuf(format) + bytes(10_240)
    with pytest.raises(ValueError, match=r"^a\.tar .*\((header|'a\.jpg'|the header)"):
        listed(content)


def test_headers_within_headers_are_refused():
    header = tarfile.TarInfo("a.jpg")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 0
    with pytest.raises(ValueError, match=r"^a\.tar is cut short, damaged or not a plain tar"):
        listed(header.tobuf(tarfile.GNU_FORMAT) * 3000 + bytes(1024))


def test_a_damaged_shard_is_neither_indexed_nor_verified(tmp_path):
    index = write(tmp_path / "own", (3,))
    path = tmp_path / "own" / index.shard_names[0]
    header_of_the_second = index.row(1).image_offset - 512
    path.write_bytes(flipped(path.read_bytes(), header_of_the_second))
    with pytest.raises(ValueError, match=r"shard .*shard-000000\.tar is cut short, damaged or"):
        verify(tmp_path / "own")
    shard = made(*((f"{n}.jpg", encoded(n)) for n in range(3)))
    (tmp_path / "0.tar").write_bytes(flipped(shard, shard.index(b"2.jpg")))
    with pytest.raises(ValueError, match=r"0\.tar is cut short, damaged or not a plain tar"):
        index_external(tmp_path)
