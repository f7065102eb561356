"""A published bank is found again, and searched exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memseg_dist.batch import Clock
from memseg_dist.memory.layouts import Rings
from memseg_dist.memory.means import ClassMeans
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Overwrite
from memseg_dist.tools.search import PublishedRows

UIDS = ["n1", "n2", "n3"]


@pytest.fixture
def published(tmp_path):
    bank = ShardedRows(Rings(3, 2), Overwrite(), 4)
    means = ClassMeans(bank)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 4, generator=generator)
    for step, class_id in enumerate((0, 2, 0, 0, 2)):
        bank.propose([class_id], vectors[step : step + 1], Clock(step=step))
        bank.commit(Clock(step=step))
    bank.publish(tmp_path / "bank", UIDS)
    return tmp_path / "bank", means


def test_rows_come_back(published):
    path, expected = published
    rows = PublishedRows.open(path)
    assert rows.uids.tolist() == ["n1", "n1", "n3", "n3"] and rows.positions.tolist() == [
        0,
        1,
        0,
        1,
    ]
    assert rows.last_steps.tolist() == [3, 2, 1, 4]
    means = rows.class_means()
    assert means.uids.tolist() == ["n1", "n3"] and means.positions.tolist() == [-1, -1]
    np.testing.assert_allclose(means.vectors, expected.means[[0, 2]].numpy(), rtol=1e-6)
    only_file = next(path.glob("*.parquet"))
    assert np.array_equal(PublishedRows.open(only_file).vectors, rows.vectors)


def test_nearest_is_the_largest_cosine(published):
    rows = PublishedRows.open(published[0])
    queries = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 30
    unit = rows.vectors / np.linalg.norm(rows.vectors, axis=1, keepdims=True)
    cosine = queries @ unit.T / np.linalg.norm(queries, axis=1, keepdims=True)
    for query, found in enumerate(rows.nearest(queries, 3)):
        order = np.argsort(-cosine[query])[:3]
        assert [(item.uid, item.position) for item in found] == [
            (rows.uids[row], rows.positions[row]) for row in order
        ]
        np.testing.assert_allclose([item.cosine for item in found], cosine[query, order], atol=1e-5)


def test_a_row_finds_itself_and_never_more_than_there_are(published):
    rows = PublishedRows.open(published[0])
    found = rows.nearest(rows.of_class("n3"), 100)
    assert [item.position for item in (found[0][0], found[1][0])] == [0, 1]
    assert len(found[0]) == 4 and found[0][0].cosine == pytest.approx(1, abs=1e-5)


def test_errors_name_what_is_wrong(published, tmp_path):
    rows = PublishedRows.open(published[0])
    with pytest.raises(ValueError, match="no rows of class 'n2'"):
        rows.of_class("n2")
    with pytest.raises(ValueError, match="bank of 4 channels"):
        rows.nearest(np.zeros((1, 5), np.float32), 1)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=r"cut\.parquet is not a readable Parquet file"):
        PublishedRows.open(tmp_path / "cut.parquet")
    file = next(published[0].glob("*.parquet"))
    content = file.read_bytes()
    for at in range(0, len(content), 23):
        file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            assert np.array_equal(PublishedRows.open(published[0]).vectors, rows.vectors), at
        except ValueError as error:
            assert str(file) in str(error)
    with pytest.raises(ValueError, match="no published bank"):
        PublishedRows.open(tmp_path / "nowhere")
    ShardedRows(Rings(3, 2), Overwrite(), 4).publish(tmp_path / "empty", UIDS)
    with pytest.raises(ValueError, match="no rows: nothing was committed"):
        PublishedRows.open(tmp_path / "empty")
