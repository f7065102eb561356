"""Files behind paths and URLs."""

import sys
from pathlib import Path

import pytest

from memseg_dist.data.files import (
    filesystem_of,
    local_path,
    make_folder,
    read_bytes,
    read_json,
    write_atomically,
)
from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.tools.external import ensure_indexed


@pytest.mark.parametrize(("url", "extra"), [("s3://bucket/data", "s3"), ("gs://bucket/a", "gcs")])
def test_a_store_whose_package_is_not_installed_names_it(url, extra, tmp_path, monkeypatch):
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    with pytest.raises(ValueError, match=rf"cannot open {url}.*'memseg-dist\[{extra}\]'"):
        Index.open(url, tmp_path)


def test_an_unknown_kind_of_url(tmp_path):
    with pytest.raises(ValueError, match=r"cannot open ftpp://a/b: Protocol not known: ftpp"):
        read_bytes("ftpp://a/b")


def test_a_server_that_cannot_be_reached(tmp_path):
    url = "http://127.0.0.1:9"  # where nobody listens
    for attempt in (lambda: ensure_indexed([f"{url}/data"], tmp_path),
                    lambda: read_json(f"{url}/data.json")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"cannot read {url}/data.*Connect call failed"):
            attempt()


def test_json_that_is_nested_too_deeply_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json: not JSON \(.*recursion"):
        read_json(tmp_path / "a.json")


def test_half_a_character_in_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(r'["\ud83d\ude00"]')
    assert read_json(tmp_path / "a.json") == ["\N{GRINNING FACE}"]
    for content in (rb'["\ud83d"]', rb'["\uDE00"]', b'["\xed\xa0\x80"]'):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"a\.json: not JSON \(.*surrogates not|a\.json: .*invalid"
        ):
            read_json(tmp_path / "a.json")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write to .*aaa: .*File name too long"):
        write_atomically(tmp_path / ("a" * 300), b"")


def test_nothing_is_written_to_a_folder_named_like_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (Vocabulary(()).save, make_folder, lambda url: write_atomically(url, b"")):
        for url in ("s3://bucket/a", "memory://a"):
            with pytest.raises(ValueError, match=f"cannot write to the URL {url}"):
                write(url)
            with pytest.raises(ValueError, match="is a URL that has lost a slash, as in a Path"):
                write(Path(url))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b", "a b"])
def test_any_letter_in_a_file_url(tmp_path, name):
    url = f"file://{tmp_path}/{name}"
    assert str(local_path(url)) == filesystem_of(url)[1] == str(tmp_path / name)
    write_atomically(url, b"1")
    assert read_bytes(url) == (tmp_path / name).read_bytes() == b"1"
