"""Images per second of this package's loader, of webdataset's, of a torch folder data set, and of
decoding alone, over the same pictures, with the same augmentation, in one run.

    python benchmarks/loader.py [--images 256] [--side 500 375] [--crop 512] [--processes 0 2]

Generated JPEGs and 16-bit masks are written once as shards and once as a folder. Each way gives
batches of two augmented crops (`data.augment`, LarvSeg's pipeline) with masks in a tensor; what
differs is how samples are found, read and dealt out. "decode" opens the JPEG of every sample and
does nothing else. The ways take turns, several times, and the median counts: without loader
processes it is of this process's CPU time, which other work on the machine does not lengthen, with
them of wall time.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from memseg_dist.batch import derive_seed
from memseg_dist.data.augment import AugmentConfig, Augmented, augment
from memseg_dist.data.decode import decode_image, decode_mask, encode_mask
from memseg_dist.data.loader import Source, TrainLoader
from memseg_dist.data.vocabulary import Category, LabelSpace, Vocabulary
from memseg_dist.tools.shards import Sample, finish, write_shard

BATCH, SHARD = 2, 64
CLASSES = Vocabulary(tuple(Category(f"c{i}", f"class {i}") for i in range(20)))


def picture(number: int, width: int, height: int) -> tuple[bytes, np.ndarray]:
    """A JPEG of smooth blobs with noise, 0.2 to 0.3 bytes a pixel as a photograph's, and a mask."""
    draw = np.random.default_rng(number)
    blobs = draw.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + draw.normal(0, 3, smooth.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    ids = draw.integers(0, len(CLASSES), (height // 60 + 1, width // 60 + 1), dtype=np.uint16)
    return buffer.getvalue(), np.kron(ids, np.ones((60, 60), np.uint16))[:height, :width]


def write(root: Path, count: int, side: tuple[int, int]) -> None:
    (root / "folder").mkdir()
    for first in range(0, count, SHARD):
        samples = []
        for number in range(first, min(first + SHARD, count)):
            image, mask = picture(number, *side)
            samples.append(Sample(f"{number:06d}", image, "jpg", (), mask))
            (root / "folder" / f"{number:06d}.jpg").write_bytes(image)
            (root / "folder" / f"{number:06d}.png").write_bytes(encode_mask(mask))
        write_shard(root / "shards", first // SHARD, samples, num_classes=len(CLASSES))
    finish(root / "shards", CLASSES)


# -------------------------------------------------------------------- the ways


def cropped(image: bytes, mask: bytes, config: AugmentConfig, key: str) -> Augmented:
    return augment(
        decode_image(image, "jpg"), decode_mask(mask), config, derive_seed(0, "augment", 0, key)
    )


def stacked(crops: list[Augmented]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.stack([getattr(crop, name) for crop in crops]) for name in
                 ("image", "valid", "mask"))  # fmt: skip


class Folder(Dataset):
    def __init__(self, root: Path, config: AugmentConfig) -> None:
        self.paths, self.config = sorted(root.glob("*.jpg")), config

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Augmented:
        path = self.paths[number]
        mask = path.with_suffix(".png").read_bytes()
        return cropped(path.read_bytes(), mask, self.config, path.stem)


def from_member(sample: dict, config: AugmentConfig) -> Augmented:
    return cropped(sample["jpg"], sample["mask.png"], config, sample["__key__"])


def ours(root: Path, config: AugmentConfig, processes: int) -> Iterator[object]:
    source = Source("ours", str(root / "shards"), "masks", 1, BATCH, config)
    space = LabelSpace.union({"ours": CLASSES})
    loader = TrainLoader([source], space, seed=0, cache_dir=root / "cache", num_processes=processes)
    yield None  # from here on time counts
    while True:
        yield from (batch for slots in loader.steps(0, 1 << 40) for batch, _ in slots)


def forever(loader: DataLoader) -> Iterator[object]:
    yield None
    while True:
        yield from loader


def webdatasets(root: Path, config: AugmentConfig, processes: int) -> Iterator[object]:
    names = sorted(str(path) for path in (root / "shards").glob("*.tar"))
    data = webdataset.WebDataset(names, shardshuffle=False, resampled=True, empty_check=False)
    data = data.shuffle(SHARD).map(functools.partial(from_member, config=config))
    data = data.batched(BATCH, collation_fn=stacked)
    return forever(DataLoader(data, batch_size=None, num_workers=processes))


def folder(root: Path, config: AugmentConfig, processes: int) -> Iterator[object]:
    data = Folder(root / "folder", config)
    return forever(
        DataLoader(data, BATCH, shuffle=True, num_workers=processes, collate_fn=stacked,
                   persistent_workers=processes > 0)
    )  # fmt: skip


def decode(root: Path, config: AugmentConfig, processes: int) -> Iterator[object]:
    paths = sorted((root / "folder").glob("*.jpg"))
    yield None
    while True:
        for first in range(0, len(paths), BATCH):
            yield [decode_image(p.read_bytes(), "jpg") for p in paths[first : first + BATCH]]


WAYS: dict[str, Callable[[Path, AugmentConfig, int], Iterator[object]]] = {
    "ours": ours, "webdataset": webdatasets, "torch folder": folder, "decode alone": decode,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Images per second of four ways to load.")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, nargs=2, default=(500, 375), help="width, height")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--processes", type=int, nargs="+", default=(0, 2))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    config = AugmentConfig(resize=(4 * options.crop, options.crop), crop=options.crop)
    num_batches = options.images // BATCH  # a turn is an epoch: every way sees every picture
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(root, options.images, tuple(options.side))
        for processes in options.processes:
            clock = time.perf_counter if processes else time.process_time
            ways = {way: WAYS[way] for way in WAYS if not processes or way != "decode alone"}
            streams = {way: make(root, config, processes) for way, make in ways.items()}
            took: dict[str, list[float]] = {way: [] for way in ways}
            for stream in streams.values():
                for _ in range(3):
                    next(stream)  # starts what there is to start
            for _ in range(options.turns):
                for way, stream in streams.items():
                    start = clock()
                    for _ in range(num_batches):
                        next(stream)
                    took[way].append((clock() - start) / num_batches / BATCH)
            for way, seconds in took.items():
                rows.append(
                    {"way": way, "processes": processes, "seconds": float(np.median(seconds))}
                )
    print("| way | loader processes | images/s | ms an image |\n| --- | --- | --- | --- |")
    for row in rows:
        per_image = row["seconds"]
        shown = f"{1 / per_image:.1f} | {1e3 * per_image:.1f}"
        print(f"| {row['way']} | {row['processes']} | {shown} |")
    print(f"\n{json.dumps(measure.machine('cpu'))}")
    if options.json:
        measure.write_json(options.json, rows)


if __name__ == "__main__":
    main()
