"""Samples of a split with masks, for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from memseg_dist.data.augment import fit_image
from memseg_dist.data.cache import DEFAULT_CACHE_BYTES, ShardCache
from memseg_dist.data.files import default_cache
from memseg_dist.data.index import Index
from memseg_dist.data.reader import Reader
from memseg_dist.data.source import Source, check_source, known
from memseg_dist.data.vocabulary import LabelSpace


class EvalItem(NamedTuple):
    """image uint8 [3, h, w], resized; truth int64 [H, W] in label-space ids at the stored size."""

    image: Tensor
    truth: Tensor
    key: str
    labels: tuple[int, ...]


class EvalDataset(Dataset[EvalItem]):
    """A split with masks for evaluation, in the index's order.

    resize: (long, short) that images are made to fit, or without `keep_ratio` to have; None = as
    stored.
    """

    def __init__(
        self,
        path: str | Path,
        label_space: LabelSpace,
        source_name: str,
        resize: tuple[int, int] | None = (2048, 512),
        *,
        keep_ratio: bool = True,
        cache_dir: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        cache = Path(cache_dir or default_cache())
        source = Source(source_name, str(path), "masks")
        self.index = Index.open(path, cache)
        to_union = label_space.ids(source_name)
        check_source(source, self.index, len(to_union))
        shards = ShardCache(cache / "shards", cache_bytes)
        self._reader = Reader(self.index, shards, to_union)
        self._resize, self._keep_ratio = resize, keep_ratio

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> EvalItem:
        image, mask, labels = self._reader.read(row, with_mask=True)
        if self._resize is not None:
            image = fit_image(image, self._resize, keep_ratio=self._keep_ratio)
        return EvalItem(image, known(mask).long(), self.index.key(row), labels)
