"""Table 3 of MCIBI: what its module and the usual context modules cost in one inference forward.

    python benchmarks/complexity.py                      # the paper's map, minutes on a CPU
    python benchmarks/complexity.py --size 64
    python benchmarks/complexity.py --device cuda

Every module is the segmenter of `MCIBIConfig` around a ResNet's last map [1, 2048, size, size],
without its last classifier H2, without auxiliary heads and, as the paper counts, without H1: given
logits stand for W (and for OCR's regions). "+ H1" has H1. UPerNet reads all four maps of a ResNet
of stride 8. Multiply-adds are counted from the shapes alone, at the size asked for:
"convolutions", which is what the paper calls FLOPs, and with all matrix products: the attention,
softmax(W) M, OCR's regions and the enlargements. Time (on a CPU: of its cores, whatever else
runs) and peak memory (beyond the inputs and weights) come from a process per module.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import measure
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memseg_dist.methods.mcibi.config import MCIBIConfig
from memseg_dist.methods.mcibi.network import Network
from memseg_dist.nn.backbone import FeatureStage

STAGES = tuple(
    FeatureStage(dim, stride) for dim, stride in ((256, 4), (512, 8), (1024, 8), (2048, 8))
)
MODULES = {
    "ASPP": {"context": "aspp", "memory": "off"},
    "PPM": {"context": "ppm", "memory": "off"},
    "DCA": {},
    "ASPP + DCA": {"context": "aspp"},
    "DCA + H1": {},
    "non-local": {"memory": "image"},
    "OCR": {"context": "ocr", "memory": "off", "aux_heads": (0,)},
    "UPerNet": {"context": "uper", "memory": "off", "stages": (-4, -3, -2, -1)},
}
PAPER = {
    "ASPP": (42.21, 674.47, 101.44),
    "PPM": (23.07, 309.45, 29.57),
    "DCA": (14.82, 242.80, 47.64),
    "ASPP + DCA": (45.63, 730.56, 125.03),
}
"""Parameters (M), "FLOPs" (G) and time on a V100 (ms) at [1, 2048, 128, 128]."""
NOTE = (
    "Brackets: a side of 128, on a V100. ASPP + DCA has 3 x 3 convolutions before DCA and in both "
    "fusions, as the released code has; 1 x 1 in these three places give 45.6 M parameters and "
    "730 G, about the paper's row."
)


@dataclass(frozen=True)
class Complexity:
    """What to measure."""

    size: int = 128
    """Side of the map."""
    dim: int = 512
    classes: int = 150
    modules: tuple[str, ...] = tuple(MODULES)
    device: str = "cpu"
    threads: int = 1
    repeats: int = 3
    """Timed forwards, of which the median counts, after one to warm up."""
    memory_gb: float = 12.0
    """Time a smaller map (half the side, and so on) if this one would take more on a CPU."""
    tf32: bool = False
    """Let CUDA round the factors of products to 10 bits; a V100 cannot."""
    json: Path | None = None
    """Write the figures there, module by module."""
    worker: str | None = None
    """Measure this module in this process; for the script's own use."""


class Given(nn.Module):
    """Stands for a classifier: logits of this shape, whatever the features are."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("logits", torch.randn(shape))

    def forward(self, features: Tensor) -> Tensor:
        return self.logits


def build(name: str, size: int, dim: int, classes: int) -> Network:
    """The segmenter without H2 and, but for "+ H1", without H1."""
    config = MCIBIConfig(**{"stages": (-1,), "aux_heads": (), "dim": dim, **MODULES[name]})
    net = Network(config, STAGES[-len(config.stages) :], classes)
    net.classify = nn.Identity()
    given = Given(1, classes, size, size)
    net.auxiliary = nn.ModuleList(given for _ in config.aux_heads)
    if net.dataset is not None and "H1" not in name:
        net.dataset.classify = given
    return net.eval()


def draw_maps(net: Network, size: int, device: str) -> list[Tensor]:
    stages = STAGES[-len(net.config.stages) :]
    sides = [size * STAGES[-1].stride // stage.stride for stage in stages]
    return [torch.randn(1, s.dim, side, side, device=device) for s, side in zip(stages, sides)]


def count(name: str, size: int, dim: int, classes: int) -> dict[str, float]:
    """Parameters, and multiply-adds of one forward, from shapes alone."""
    with torch.device("meta"):
        net = build(name, size, dim, classes)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net(draw_maps(net, size, "meta"))
    by_operator = {
        str(key): flops / 2 for key, flops in counter.get_flop_counts()["Global"].items()
    }
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "convolutions": sum(n for key, n in by_operator.items() if "convolution" in key),
        "all": sum(by_operator.values()),
    }


def cost(name: str, options: Complexity) -> dict[str, float]:
    """Seconds and peak memory of one forward, at the largest size that fits."""
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    size = options.size
    if options.device == "cpu":
        small = max(1, size // 4)
        taken = _cost(name, small, options, repeats=0)["MiB"]
        size = fitting_size(options, mebibytes_per_position=taken / small**2)
    return {"size": size} | _cost(name, size, options, options.repeats)


def fitting_size(options: Complexity, mebibytes_per_position: float) -> int:
    """The side, halved until its positions fit: memory grows with them, no [N, N] is kept."""
    size = options.size
    while (
        size > 1 and mebibytes_per_position * size**2 > options.memory_gb * 1e9 / measure.MEBIBYTE
    ):
        size //= 2
    return size


def _cost(name: str, size: int, options: Complexity, repeats: int) -> dict[str, float]:
    net = build(name, size, options.dim, options.classes).to(options.device)
    maps = draw_maps(net, size, options.device)
    with torch.inference_mode():
        figures = {"MiB": measure.peak_mebibytes(lambda: net(maps), options.device)}
        if repeats:
            clock = measure.clock_of(options.device)
            figures["seconds"] = measure.seconds(
                lambda: net(maps), repeats=repeats, warm_up=0, clock=clock
            )
    return figures


def main(options: Complexity) -> None:
    if options.worker:
        print(json.dumps(cost(options.worker, options)))
        return
    names = ("size", "dim", "classes", "device", "threads", "repeats", "memory_gb")
    flags = [part for n in names for part in (f"--{n.replace('_', '-')}", getattr(options, n))]
    flags.append("--tf32" if options.tf32 else "--no-tf32")
    size, rows = options.size, []
    table = Table("module", "parameters (M)", "convolutions (G)", "all products (G)", "ms",
                  "peak (MiB)", "side timed", caption_justify="left", caption=NOTE,
                  title=f"[1, 2048, {size}, {size}], in brackets the paper's")  # fmt: skip
    for name in options.modules:
        row = count(name, size, options.dim, options.classes)
        row |= measure.in_subprocess(__file__, name, *flags, timeout=3600)
        rows.append({"module": name} | row)
        if options.json:
            measure.write_json(options.json, rows)
        shown = [f"{row['parameters'] / 1e6:.2f}", f"{row['convolutions'] / 1e9:.2f}"]
        taken = [row.get("failed", "-"), "-", "-"]
        if "seconds" in row:
            taken = [f"{1e3 * row['seconds']:,.1f}", f"{row['MiB']:,.0f}", str(row["size"])]
        shown += [f"{row['all'] / 1e9:.2f}", *taken]
        for column, figure in zip((0, 1, 3), PAPER.get(name, ())):
            shown[column] += f" ({figure:.2f})"
        table.add_row(name, *shown)
    tf32 = {"threads": options.threads, "tf32": options.tf32}
    Console().print(table, measure.machine(options.device) | tf32)


if __name__ == "__main__":
    main(tyro.cli(Complexity, description=__doc__))
