"""Writing shards, indexing them, checking them."""

import json
import os
import tarfile
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.made import NUM_CLASSES, VOCABULARY, blocks, encoded, sample, write

from memseg_dist.data.index import Index
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.shards import Sample, escape_key, finish, shard_is_done, write_shard
from memseg_dist.tools.verify import verify


def test_members_are_where_the_index_says(tmp_path):
    index = write(tmp_path, (3, 2))
    assert index.shard_names == ["shard-000000.tar", "shard-000001.tar"]
    assert index.shard_sizes.tolist() == [3, 2]
    for number in range(5):
        row = index.row(number)
        content = (tmp_path / row.shard).read_bytes()
        image = content[row.image_offset : row.image_offset + row.image_size]
        assert image == sample(number).image
        assert content[row.mask_offset :].startswith(b"\x89PNG")
        assert (row.width, row.height, row.image_format) == (40, 30, "jpg")
    table = pq.read_table(tmp_path / "index.parquet").to_pylist()
    for number, row in enumerate(table):
        mask = blocks(number)
        classes = {*mask[mask != 65535].tolist(), number % NUM_CLASSES}
        assert row["labels"] == sorted(classes)
        assert row["pixels"] == [int((mask == label).sum()) for label in sorted(classes)]
    assert not [*tmp_path.glob("*.index.parquet")]


def test_webdataset_reads_our_shards(tmp_path):
    import webdataset

    write(tmp_path, (3,))
    shards = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
    items = [*shards]
    assert [item["__key__"] for item in items] == [sample(i).key for i in range(3)]
    assert items[1]["jpg"] == sample(1).image
    assert 1 in json.loads(items[1]["json"])["labels"]
    assert "mask.png" in items[1]


def test_bytes_depend_on_the_samples_alone(tmp_path):
    write(tmp_path / "a", (4,))
    write(tmp_path / "b", (4,))
    for name in ("shard-000000.tar", "index.parquet", "vocabulary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_extra_values_are_kept_in_the_json(tmp_path):
    made = replace(sample(0, with_mask=False), extra={"licence": 3})
    write_shard(tmp_path, 0, [made], num_classes=NUM_CLASSES)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        content = json.load(tar.extractfile("image0000.json"))
    assert content == {"labels": [0], "licence": 3}


def test_a_finished_shard_is_skipped_and_an_unfinished_one_written_again(tmp_path):
    def failing():
        yield sample(0)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shard(tmp_path, 0, failing(), num_classes=NUM_CLASSES)
    assert not os.listdir(tmp_path)
    assert not shard_is_done(tmp_path, 0)
    assert write_shard(tmp_path, 0, [sample(0)], num_classes=NUM_CLASSES) == 1
    assert write_shard(tmp_path, 0, failing(), num_classes=NUM_CLASSES) == 1


def test_a_data_set_can_grow_and_finish_can_be_repeated(tmp_path):
    write(tmp_path, (2, 2))
    write_shard(tmp_path, 2, [sample(8), sample(9)], num_classes=NUM_CLASSES)
    index = finish(tmp_path, VOCABULARY)
    assert [index.key(i) for i in range(6)] == [f"image{i:04d}" for i in (0, 1, 2, 3, 8, 9)]
    assert len(finish(tmp_path, VOCABULARY)) == 6
    assert str(verify(tmp_path)) == "3 shards, 6 samples, 6 masks"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (NUM_CLASSES,)}, r"'image0000': label 6 is outside the vocabulary of 6"),
        ({"labels": (-1,)}, r"label -1 is outside"),
        ({"mask": np.full((30, 40), 9, np.uint16)}, r"label 9 is outside the vocabulary"),
        ({"mask": blocks(0, 20, 30)}, r"the mask is 20 x 30 pixels but the image is 40 x 30"),
        ({"mask": blocks(0).astype(np.int64)}, r"the mask is int64 \[30, 40\]; it must be uint16"),
        ({"image_format": "png"}, r"'image0000': not a readable PNG"),
        ({"image_format": "gif"}, r"image format 'gif' is not allowed"),
        ({"image": b"nothing"}, r"not a readable JPEG"),
        ({"key": "a.b"}, r"key must not hold '\.'"),
        ({"key": "../a"}, r"key must not hold '\.'"),
        ({"key": "/a"}, r"nor start with '/'"),
        ({"extra": {"labels": []}}, r"extra must not hold 'labels'"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, 0, [replace(sample(0), **changes)], num_classes=NUM_CLASSES)
    assert not os.listdir(tmp_path)


def test_repeated_keys_are_named(tmp_path):
    with pytest.raises(ValueError, match="'image0000' is given twice in one shard"):
        write_shard(tmp_path, 0, [sample(0), sample(0)], num_classes=NUM_CLASSES)
    for shard in range(2):
        write_shard(tmp_path, shard, [sample(0)], num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match="key 'image0000' is given to two samples"):
        finish(tmp_path, VOCABULARY)


def test_nothing_to_write_or_to_finish_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no samples were given"):
        write_shard(tmp_path, 0, [], num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match="no shards to index; write some"):
        finish(tmp_path, VOCABULARY)


def test_a_damaged_part_index_is_named(tmp_path):
    write_shard(tmp_path, 0, [sample(0)], num_classes=NUM_CLASSES)
    part = tmp_path / "shard-000000.index.parquet"
    overwrite(part, 20, b"\0" * 30)
    with pytest.raises(ValueError, match=rf"{part} is not a readable Parquet file"):
        finish(tmp_path, VOCABULARY)
    write_shard(tmp_path, 1, [sample(1)], num_classes=NUM_CLASSES)
    part.unlink()
    part = tmp_path / "shard-000001.index.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["width"]), part)
    with pytest.raises(ValueError, match=rf"{part}: column 'width' is absent"):
        finish(tmp_path, VOCABULARY)


def test_finish_checks_the_vocabulary_and_the_shards(tmp_path):
    write_shard(tmp_path, 0, [sample(5)], num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match="label 5 is outside the vocabulary of 2 classes"):
        finish(tmp_path, Vocabulary(VOCABULARY.categories[:2]))
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000000\.tar is missing"):
        finish(tmp_path, VOCABULARY)


def test_a_vocabulary_may_only_grow(tmp_path):
    write(tmp_path, (6,), with_masks=False)
    first, second, *others = VOCABULARY.categories
    for part in (False, True):
        if part:
            write_shard(tmp_path, 1, [sample(6, with_mask=False)], num_classes=NUM_CLASSES)
        with pytest.raises(ValueError, match=r"class 0 is 'n0', but 'n1' in the new vocabulary"):
            finish(tmp_path, Vocabulary((second, first, *others)))
        with pytest.raises(ValueError, match=r"class 2 is 'n2', but absent in the new vocabulary"):
            finish(tmp_path, Vocabulary((first, second)))
    grown = Vocabulary((*VOCABULARY.categories, Category("n6", "class 6")))
    assert finish(tmp_path, grown).vocabulary == grown
    (tmp_path / "vocabulary.json").write_text('{"format": 1, "categories": []}')
    with pytest.raises(ValueError, match="label 5 is outside the vocabulary of 2 classes"):
        finish(tmp_path, Vocabulary((first, second)))


def test_an_indexed_shard_takes_no_other_samples(tmp_path):
    write(tmp_path, (2, 1))
    before = (tmp_path / "shard-000000.tar").read_bytes()
    with pytest.raises(ValueError, match=r"shard-000000\.tar is in index\.parquet with other"):
        write_shard(tmp_path, 0, [sample(8), sample(9)], num_classes=NUM_CLASSES)
    assert (tmp_path / "shard-000000.tar").read_bytes() == before
    verify(tmp_path)
    (tmp_path / "shard-000000.tar").unlink()  # lost: the same one may be written again
    assert write_shard(tmp_path, 0, [sample(0), sample(1)], num_classes=NUM_CLASSES) == 2
    assert len(finish(tmp_path, VOCABULARY)) == len(verify(tmp_path)) == 3


def test_an_unwritable_output_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file/data.*may write to"):
        write_shard(tmp_path / "file" / "data", 0, [sample(0)], num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match="cannot write to the URL s3://bucket"):
        write_shard("s3://bucket/data", 0, [sample(0)], num_classes=NUM_CLASSES)


def test_any_file_name_makes_a_key(tmp_path):
    names = ["a.b/c d.x", "/root", "_hidden", "100%", "x\u3000y", "x\u2028", "x 28", "plain-1/ö"]
    keys = [escape_key(name) for name in names]
    assert [unquote(key) for key in keys] == names
    assert keys[0] == "a%2Eb/c%20d%2Ex" and keys[-1] == "plain-1/ö"
    samples = [replace(sample(i), key=key) for i, key in enumerate(keys)]
    write_shard(tmp_path, 0, samples, num_classes=NUM_CLASSES)
    index = finish(tmp_path, VOCABULARY)
    assert [*index.all_keys()] == keys
    verify(tmp_path)


def test_png_and_webp_images(tmp_path):
    made = [
        Sample("a", encoded(1, image_format="PNG"), "png"),
        Sample("b", encoded(2, image_format="WEBP"), "webp", (2, 1, 2)),
        Sample("c", encoded(3), "jpeg"),
    ]
    write_shard(tmp_path, 0, made, num_classes=NUM_CLASSES)
    index = finish(tmp_path, VOCABULARY)
    assert [index.row(i).image_format for i in range(3)] == ["png", "webp", "jpg"]
    assert [index.row(i).labels for i in range(3)] == [(), (1, 2), ()]
    assert verify(tmp_path).num_masks == 0


def overwrite(path, offset, content):
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def test_verify_lists_what_is_wrong(tmp_path):
    index = write(tmp_path, (3, 2, 2))
    row, other = index.row(1), index.row(4)
    overwrite(tmp_path / row.shard, row.image_offset, b"\0" * row.image_size)
    overwrite(tmp_path / other.shard, other.mask_offset + 60, b"\0" * 20)
    (tmp_path / "shard-000002.tar").unlink()
    with pytest.raises(ValueError, match="3 problems") as raised:
        verify(tmp_path)
    message = str(raised.value)
    assert "'image0001': not a readable JPEG image" in message
    assert "'image0004': not a readable PNG image (broken PNG" in message
    assert "cannot read " in message and "shard-000002.tar" in message


def test_verify_notices_truncation_and_a_wrong_index(tmp_path):
    index = write(tmp_path, (3,))
    path = tmp_path / "shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: index.row(2).image_offset + 100])
    with pytest.raises(ValueError, match=r"cut short(.|\n)*2 samples of the index are absent"):
        verify(tmp_path)
    path.write_bytes(content)
    table = pq.read_table(tmp_path / "index.parquet")
    first, *others = table["labels"].to_pylist()
    labels = [[label + 1 for label in first], *others]
    changed = table.set_column(9, table.schema.field(9), pa.array(labels, pa.list_(pa.int32())))
    pq.write_table(changed, tmp_path / "index.parquet")
    with pytest.raises(ValueError, match=r"'image0000': its labels is .* but the index says"):
        verify(tmp_path)


def test_an_index_with_other_columns_or_no_parquet_is_refused(tmp_path):
    write(tmp_path, (2,))
    table = pq.read_table(tmp_path / "index.parquet")
    pq.write_table(table.drop_columns(["width"]), tmp_path / "index.parquet")
    with pytest.raises(ValueError, match=r"index\.parquet: column 'width' is absent"):
        Index.open(tmp_path)
    (tmp_path / "index.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        Index.open(tmp_path)
