"""The memory-mapped index."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.made import NUM_CLASSES, REPOSITORY, sample, write

from memseg_dist.batch import IGNORE
from memseg_dist.data.index import Index
from memseg_dist.data.order import repeat_factors


def test_columns_are_mapped_and_shared_through_pickle(labels_root):
    index = Index.open(labels_root)
    again = pickle.loads(pickle.dumps(index))
    assert isinstance(index.labels_values.base, np.memmap)
    assert len(pickle.dumps(index)) < 1000
    for number in range(len(index)):
        assert again.row(number) == index.row(number)
        assert index.key(number) == sample(number).key
        assert index.labels(number) == (number % NUM_CLASSES,)
    assert index.shard_starts.tolist() == [0, 4, 8, 14]
    assert (index.num_masks, index.max_label) == (0, NUM_CLASSES - 1)
    assert index.vocabulary.uids[0] == "n0"
    with pytest.raises(IndexError, match="row 14 of 14"):
        index.row(14)


def test_class_image_counts(labels_root, masks_root):
    assert Index.open(labels_root).class_image_counts(NUM_CLASSES).tolist() == [3, 3, 2, 2, 2, 2]
    index = Index.open(masks_root)
    counts = np.zeros(NUM_CLASSES, int)
    for number in range(len(index)):
        counts[list(index.labels(number))] += 1
    assert index.class_image_counts(NUM_CLASSES).tolist() == counts.tolist()


def test_a_changed_index_is_converted_again(tmp_path):
    assert len(write(tmp_path / "data", (2,))) == 2
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    assert len(write(tmp_path / "data", (3,))) == 3


def test_rows_of_a_shard_must_be_together(tmp_path):
    write(tmp_path, (2, 2))
    table = pq.read_table(tmp_path / "index.parquet")
    pq.write_table(table.take([0, 2, 1, 3]), tmp_path / "index.parquet")
    with pytest.raises(ValueError, match=r"rows of shard shard-000000\.tar are not together"):
        Index.open(tmp_path)


def test_no_damage_of_an_index_goes_by(tmp_path):
    path = tmp_path / "index.parquet"
    rows = write(tmp_path, (2, 2))._rows.to_pylist()
    whole = path.read_bytes()
    for position in range(0, len(whole), 31):
        changed = bytes([whole[position] ^ (1 << position % 8)])
        for damaged in (whole[:position], whole[:position] + changed + whole[position + 1 :]):
            path.write_bytes(damaged)
            try:
                assert Index.open(tmp_path)._rows.to_pylist() == rows
            except ValueError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("key", None, "'key' has empty cells"),
        ("labels", [None], "'labels' has empty cells"),
        ("labels", [-3], "'labels' is -3 .. "),
        ("image_size", 2**60, f"'image_size' is .* {2**60}"),
        ("mask_offset", -1, "'mask_offset' is -1 .. "),
        ("image_format", "exe", "an image format is not one of"),
    ],
)
def test_an_edited_index_says_what_is_wrong(tmp_path, column, value, message):
    write(tmp_path, (3,))
    table = pq.read_table(tmp_path / "index.parquet")
    rows = table.to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "index.parquet")
    with pytest.raises(ValueError, match=rf"index\.parquet: {message}"):
        Index.open(tmp_path)


def test_no_data_at_the_path(tmp_path):
    with pytest.raises(ValueError, match=r"no data set at .*absent: there is no such folder"):
        Index.open(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no index\.parquet; .*memseg data index"):
        Index.open(tmp_path)
    with pytest.raises(ValueError, match=r"refusing 'pipe:cat x\.tar': a pipe: URL runs a shell"):
        Index.open("pipe:cat x.tar")


def test_missing_and_truncated_shards(tmp_path):
    index = write(tmp_path, (2, 2))
    path = tmp_path / "shard-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:2000])
    with pytest.raises(ValueError, match=r"shard-000001.tar is cut short: 2000 bytes"):
        index.check_shards()
    path.unlink()
    with pytest.raises(ValueError, match=r"shard .*shard-000001.tar is missing although"):
        index.check_shards()


def test_repeat_factors_follow_the_rarest_class(tmp_path):
    labels = np.arange(NUM_CLASSES)
    index = write(tmp_path, (13,), with_masks=False)  # class 0 in 3 of 13 images, others in 2
    share = np.array([3, 2, 2, 2, 2, 2]) / 13
    wanted = np.sqrt(0.9 / share)[np.arange(13) % NUM_CLASSES]
    repeats = repeat_factors(index, labels, 0.9)
    assert ((repeats == np.floor(wanted)) | (repeats == np.ceil(wanted))).all()
    assert len(np.unique(repeats)) > 1
    assert repeat_factors(index, labels, 0.1).tolist() == [1] * 13
    with pytest.raises(ValueError, match="repeat_threshold is 2"):
        repeat_factors(index, labels, 2)


def test_repeat_factors_follow_the_classes_of_the_run(tmp_path):
    index = write(tmp_path, (13,), with_masks=False)
    ids = np.array([0, 0, 0, 0, 0, IGNORE])  # one class in 11 of 13 images, nothing of the last
    assert repeat_factors(index, ids, 0.8).tolist() == [1] * 13
    assert repeat_factors(index, np.full(NUM_CLASSES, IGNORE), 1).tolist() == [1] * 13


def test_many_rows_cost_bounded_memory(tmp_path):
    out = tmp_path / "figures.json"
    script = REPOSITORY / "benchmarks" / "loader_memory.py"
    command = [sys.executable, str(script), "--rows", "300000", "--json", str(out)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, check=True, env=environment)
    figures = json.loads(out.read_text())
    assert figures["later_open"]["rows"] == 300_000
    assert figures["later_open"]["own_memory_growth_class_balanced_mib"] < 100
    assert figures["first_open"]["own_memory_growth_mib"] < 250
