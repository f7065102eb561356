"""The builder: resuming, skipping, refusing, and the same bytes from Ray as from one process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from memseg_dist.data.files import write_atomically
from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.build import ShardTask, build_dataset, build_pictures, command_line
from memseg_dist.tools.recipe import Picture, Skipped, cut_into_shards, picture_samples

VOCABULARY = Vocabulary((Category("n1", "cat"), Category("n2", "dog")))


def pictures_in(folder, write_image, count: int) -> list[Picture]:
    for number in range(count):
        write_image(folder / f"{number}.jpg", number)
    return [
        Picture(str(number), str(folder / f"{number}.jpg"), labels=(number % 2,))
        for number in range(count)
    ]


@pytest.fixture
def pictures(tmp_path, picture_files):
    return pictures_in(tmp_path / "in", picture_files[0], 10)


def files_of(root):
    return {
        path.name: path.read_bytes() for path in root.iterdir() if path.suffix in (".tar", ".json")
    }


def test_report_and_index(pictures, options, read_back, capsys):
    choice = options(samples_per_shard=4)
    report = build_pictures(choice.out, VOCABULARY, pictures, choice)
    assert (report.num_samples, report.num_shards, report.num_resumed) == (10, 3, 0)
    assert report.num_bytes == sum(path.stat().st_size for path in choice.out.glob("*.tar"))
    assert "10 images in 3 shards" in capsys.readouterr().out
    index = Index.open(choice.out)
    assert len(index) == 10 and list(index.shard_sizes) == [4, 4, 2]
    content = read_back(choice.out)
    for picture in pictures:
        image, labels, mask = content[picture.key]
        assert (labels, mask) == ([*picture.labels], None)
        with open(picture.image, "rb") as stream:
            assert image == stream.read()  # bytes untouched


def test_ray_writes_the_same_bytes(pictures, options, tmp_path, capfd):
    choice = options(samples_per_shard=4)
    build_pictures(choice.out, VOCABULARY, pictures, choice)
    parallel = dataclasses.replace(choice, out=tmp_path / "parallel", workers=2)
    build_pictures(parallel.out, VOCABULARY, pictures, parallel)
    assert files_of(choice.out) == files_of(parallel.out)
    assert "WARNING" not in capfd.readouterr().err


def test_a_killed_build_is_resumed(pictures, options):
    tasks = [ShardTask(picture_samples, tuple(pictures[start : start + 4])) for start in (0, 4, 8)]
    lost = pictures[9].image
    os.rename(lost, f"{lost}.away")
    with pytest.raises(ValueError, match=r"9.jpg cannot be read"):
        build_dataset(options().out, VOCABULARY, tasks, options())
    os.rename(f"{lost}.away", lost)
    for picture in pictures[:8]:
        os.remove(picture.image)  # whole shards are not read again
    report = build_dataset(options().out, VOCABULARY, tasks, options())
    assert (report.num_samples, report.num_resumed) == (10, 2)
    again = build_dataset(options().out, VOCABULARY, tasks, options())
    assert (again.num_samples, again.num_resumed) == (10, 3)
    assert len(Index.open(options().out)) == 10


def test_bad_images_are_skipped_and_reported(pictures, options, capsys):
    for picture, content in ((pictures[2], b"GIF89a"), (pictures[5], b"\xff\xd8\xff cut short")):
        with open(picture.image, "wb") as stream:
            stream.write(content)
    choice = options(samples_per_shard=4)
    report = build_pictures(choice.out, VOCABULARY, pictures, choice)
    assert report.num_samples == 8
    assert {key for key, _ in report.skipped} == {"2", "5"}
    text = capsys.readouterr().out
    assert "2 left out" in text and "not a JPEG, PNG or WebP image (such as 2)" in text
    again = build_pictures(choice.out, VOCABULARY, pictures, choice)  # the reasons are kept
    assert set(again.skipped) == set(report.skipped)


def test_skipped_images_are_known_after_a_kill_before_the_note(pictures, options, monkeypatch):
    with open(pictures[2].image, "wb") as stream:
        stream.write(b"GIF89a")
    with monkeypatch.context() as patch:
        patch.setattr("memseg_dist.tools.build.write_atomically", fail_on_notes)
        with pytest.raises(RuntimeError, match="killed"):
            build_pictures(options().out, VOCABULARY, pictures, options())
    assert (options().out / "shard-000000.tar").exists()
    report = build_pictures(options().out, VOCABULARY, pictures, options())
    assert (report.num_samples, [key for key, _ in report.skipped]) == (9, ["2"])


def fail_on_notes(path, content):
    if "shard" in path.name:
        raise RuntimeError("killed")
    write_atomically(path, content)


def test_a_changed_picture_is_other_input(pictures, options, picture_files):
    build_pictures(options().out, VOCABULARY, pictures, options())
    assert build_pictures(options().out, VOCABULARY, pictures, options()).num_resumed == 1
    picture_files[0](Path(pictures[3].image), 99)
    with pytest.raises(ValueError, match="--overwrite"):
        build_pictures(options().out, VOCABULARY, pictures, options())


def test_a_shard_of_skipped_images_is_left_out(pictures, options):
    tasks = [ShardTask(skip_all, ()), ShardTask(picture_samples, tuple(pictures))]
    report = build_dataset(options().out, VOCABULARY, tasks, options())
    assert (report.num_samples, report.num_shards, len(report.skipped)) == (10, 1, 1)
    with pytest.raises(ValueError, match="every image was skipped"):
        build_dataset(options().out / "none", VOCABULARY, tasks[:1], options())


def skip_all(payload):
    yield Skipped("a", "no reason")


def test_other_input_is_not_mixed_in(pictures, options):
    build_pictures(options().out, VOCABULARY, pictures, options())
    with pytest.raises(ValueError, match="--overwrite"):
        build_pictures(options().out, VOCABULARY, pictures[:5], options())
    choice = options(overwrite=True)
    report = build_pictures(choice.out, VOCABULARY, pictures[:5], choice)
    assert report.num_samples == len(Index.open(choice.out)) == 5


def test_a_build_that_wrote_nothing_is_replaced(pictures, options):
    wrong = [Picture("a", "nowhere.jpg")]
    with pytest.raises(ValueError, match=r"nowhere.jpg cannot be read"):
        build_dataset(
            options().out, VOCABULARY, [ShardTask(picture_samples, tuple(wrong))], options()
        )
    assert build_pictures(options().out, VOCABULARY, pictures, options()).num_samples == 10


def test_external_files_are_never_deleted(pictures, options):
    choice = options(overwrite=True)
    choice.out.mkdir()
    (choice.out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        build_pictures(choice.out, VOCABULARY, pictures, choice)
    assert (choice.out / "thesis.txt").exists()


def test_unwritable_output(pictures, options, tmp_path):
    (tmp_path / "file").write_text("")
    choice = options(out=tmp_path / "file" / "out")
    with pytest.raises(ValueError, match=r"cannot write to .*file.*give a folder"):
        build_pictures(choice.out, VOCABULARY, pictures, choice)


def test_a_url_is_no_output(pictures, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'s3:/bucket/train' is a URL that has lost a slash"):
        build_pictures(Path("s3://bucket/train"), VOCABULARY, pictures, options())
    assert not (tmp_path / "s3:").exists()


def test_no_input(options):
    with pytest.raises(ValueError, match="no images were listed"):
        build_pictures(options().out, VOCABULARY, [], options())


def test_mistakes_are_one_line(capsys):
    def build(_: object) -> None:
        raise ValueError("no folder x; check the path")

    with pytest.raises(SystemExit, match="error: no folder x"):
        command_line(build, Category, ["--uid", "a", "--name", "b"])


@pytest.mark.parametrize(("seed", "limit"), [(None, None), (0, None), (0, 7)])
def test_cutting_keeps_every_item_once(seed, limit):
    cut = {"samples_per_shard": 3, "bytes_per_shard": 100, "shuffle_seed": seed, "limit": limit}
    items = [10, 20, 90, 60, 60, 5, 5, 5, 5, 200]
    shards = cut_into_shards(items, num_bytes=lambda size: size, **cut)
    assert all(len(shard) <= 3 and (sum(shard) <= 100 or len(shard) == 1) for shard in shards)
    flat = [size for shard in shards for size in shard]
    assert len(flat) == (limit or 10)
    assert flat == items if seed is None else flat != items[:limit]
    assert shards == cut_into_shards(items, num_bytes=lambda size: size, **cut)
