"""One slot's update of MCIBI's memory: the paper's literal form against ours, time and memory.

    python benchmarks/feature_memory.py                               # two crops of ADE20K
    python benchmarks/feature_memory.py --size 512 1024 --classes 19  # of Cityscapes
    python benchmarks/feature_memory.py --device cuda

"literal" enlarges all channels to the size of the image and loops over the classes that occur;
"ours" is `class_sums`. Waits: how often the host would wait for a device in one call, counted on
the tests' pretended device. Differences: the largest of T against the literal form in fp64 (which
is taken image by image). Seconds on a CPU are of its cores, whatever else runs. Each figure comes
from a process of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import measure
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memseg_dist.batch import IGNORE
from memseg_dist.methods.mcibi.statistics import EPS, class_sums

TESTS = Path(__file__).resolve().parents[1] / "tests"
PRESENT = 12
"""Classes that may occur in an image."""
NOTE = (
    "By its shapes (not run) the released code takes 3.2 GB for two images of 512 x 512 pixels, "
    "6.4 GB for two of 512 x 1024, and 100 to 200 waits. The goal is below 50 MB, and none."
)


@dataclass(frozen=True)
class FeatureMemory:
    """What to measure."""

    images: int = 2
    size: tuple[int, int] = (512, 512)
    """Height and width of an image."""
    classes: int = 150
    dim: int = 512
    """Channels of the features."""
    stride: int = 8
    """Pixels per position of the features."""
    device: str = "cpu"
    threads: int = 1
    json: Path | None = None
    """Write the figures there."""
    worker: tuple[str, str] | None = None
    """Form and figure to take in this process; for the script's own use."""


def literal(features_BChw, target_BHW, memory_KC, is_set_K) -> tuple[Tensor, Tensor]:
    """Eq. 8 - 10 as they stand, in the manner of the released code: sums as `class_sums` gives."""
    enlarged_BCHW = F.interpolate(
        features_BChw, target_BHW.shape[1:], mode="bilinear", align_corners=False
    )
    pixels_PC = enlarged_BCHW.permute(0, 2, 3, 1).reshape(-1, features_BChw.shape[1])
    class_P = target_BHW.flatten()
    sums_KC, sums_K = torch.zeros_like(memory_KC), torch.zeros_like(memory_KC[:, 0])
    for class_id in class_P.unique().tolist():
        if class_id == IGNORE:
            continue
        own_PC = pixels_PC[class_P == class_id]
        weight_P = torch.ones_like(own_PC[:, 0])
        if is_set_K[class_id]:
            weight_P = 1 - F.cosine_similarity(own_PC, memory_KC[class_id, None]) + EPS
        sums_KC[class_id] = (weight_P[:, None] * own_PC).sum(dim=0)
        sums_K[class_id] = weight_P.sum()
    return sums_KC, sums_K


FORMS = {"literal": literal, "ours": class_sums}


def draw_inputs(options: FeatureMemory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks of 8 x 8 blocks, a tenth of them without a label; every other class has a vector."""
    generator = torch.Generator().manual_seed(0)
    height, width = options.size
    low = (options.images, options.dim, height // options.stride, width // options.stride)
    features = torch.randn(low, generator=generator).relu()
    own = torch.randint(options.classes, (options.images, PRESENT), generator=generator)
    choice = torch.randint(PRESENT, (options.images, 64), generator=generator)
    blocks = own.gather(1, choice)
    blocks[torch.rand(blocks.shape, generator=generator) < 0.1] = IGNORE
    target = F.interpolate(blocks.view(-1, 1, 8, 8).double(), options.size).long()[:, 0]
    memory = torch.randn(options.classes, options.dim, generator=generator).relu()
    is_set = torch.arange(options.classes) % 2 == 0
    return features, target, memory * is_set[:, None], is_set


def count_waits(form: str, options: FeatureMemory) -> int:
    sys.path.insert(0, str(TESTS))
    import no_host_sync

    with no_host_sync.pretended_device() as device:
        inputs = [tensor.to(device) for tensor in draw_inputs(options)]
        with mock.patch("no_host_sync._wait") as waits:
            FORMS[form](*inputs)
    return waits.call_count


def difference(form: str, dtype: torch.dtype, options: FeatureMemory) -> float:
    """The largest of |T - T of the literal form in fp64|."""
    features, target, memory, is_set = draw_inputs(options)

    def means(form: str, dtype: torch.dtype) -> Tensor:
        sums_KC, sums_K = (
            torch.zeros_like(memory, dtype=dtype),
            torch.zeros(len(memory), dtype=dtype),
        )
        for one, its_target in zip(features, target):
            part_KC, part_K = FORMS[form](
                one[None].to(dtype), its_target[None], memory.to(dtype), is_set
            )
            sums_KC, sums_K = sums_KC + part_KC, sums_K + part_K
        return sums_KC / sums_K[:, None].clamp_min(EPS)

    exact = means("literal", torch.float64)
    return (means(form, dtype).double() - exact).abs().max().item()


def take(form: str, figure: str, options: FeatureMemory) -> float:
    torch.set_num_threads(options.threads)
    if figure == "waits":
        return count_waits(form, options)
    if figure.startswith("float"):
        return difference(form, getattr(torch, figure), options)
    inputs = [tensor.to(options.device) for tensor in draw_inputs(options)]

    def update() -> None:
        FORMS[form](*inputs)

    if figure == "seconds":
        return measure.seconds(update, repeats=3, clock=measure.clock_of(options.device))
    update()
    return max(measure.peak_mebibytes(update, options.device) for _ in range(2))


def main(options: FeatureMemory) -> None:
    if options.worker:
        print(json.dumps({options.worker[1]: take(*options.worker, options)}))
        return
    flags = ["--size", *options.size]
    for name in ("images", "classes", "dim", "stride", "device", "threads"):
        flags += [f"--{name}", getattr(options, name)]
    formats = {"seconds": "{:.3f}", "MiB": "{:,.0f}", "waits": "{}"}
    formats |= {"float32": "{:.1e}", "float64": "{:.1e}"}
    table = Table("form", "seconds", "peak extra (MiB)", "waits", "difference, fp32", "fp64",
                  title=f"T of {options.images} x {options.size}", caption=NOTE,
                  caption_justify="left")  # fmt: skip
    rows = []
    for form in FORMS:
        row, shown = {"form": form}, []
        for figure, text in formats.items():
            # blocks of their own for all tensors, so that resident memory is what tensors hold
            environment = {"MALLOC_MMAP_THRESHOLD_": "65536"} if figure == "MiB" else {}
            found = measure.in_subprocess(__file__, form, figure, *flags, environment=environment)
            shown.append(text.format(found[figure]) if figure in found else found["failed"])
            row |= found
        rows.append(row)
        table.add_row(form, *shown)
    Console().print(table, measure.machine(options.device) | {"threads": options.threads})
    if options.json:
        measure.write_json(options.json, rows)


if __name__ == "__main__":
    main(tyro.cli(FeatureMemory, description=__doc__))
