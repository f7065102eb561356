"""What a GPU makes of the parts of a step, in one command of less than 8 minutes on a large one.

    python benchmarks/gpu.py [--device cuda] [--only CASE ...]
    python benchmarks/gpu.py --device cpu --tiny           # whether it runs, in seconds

It needs torch >= 2.8, torchvision, timm, numpy and safetensors; the `gpu` tests run where pytest is
there too. The step: LarvSeg at 21,841 classes on ViT-B/16 in bf16 with TF32 and a fused optimizer,
two slots of two 512-pixel images with masks of 171 classes and two of two 320-pixel images with
labels. "plain" is the same net with a linear classifier and cross-entropy, of pixels and of pooled
features. Shares of the peak are of the rates that this GPU reaches in a large product in bf16 and
in TF32 and in a copy of 1 GiB; floating-point operations are torch's own count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import measure
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from memseg_dist.batch import Batch, Clock, onto_device
from memseg_dist.memory.contrast import Contrast
from memseg_dist.memory.kmeans import kmeans
from memseg_dist.memory.layouts import Regions, Rings
from memseg_dist.memory.means import ClassMeans
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.memory.rules import Momentum, Overwrite
from memseg_dist.methods.larvseg.classifier import CosineClassifier
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.methods.larvseg.method import LarvSeg
from memseg_dist.methods.method import Method
from memseg_dist.nn.backbone import Backbone, BackboneConfig, build_backbone

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """classes: of the label space; the first mask_classes have masks. crops: pixels, of a slot with
    masks and of one with labels. regions: (classes, rows, channels) of the contrast. problems:
    (number, most rows, channels) of the clustering. product: side of the one that finds the peak.
    """

    backbone: BackboneConfig = BackboneConfig(image_size=512)  # noqa: RUF009 (frozen)
    classes: int = 21_841
    mask_classes: int = 171
    crops: tuple[int, int] = (512, 320)
    images: int = 2
    regions: tuple[int, int, int] = (80, 240_000, 512)
    problems: tuple[int, int, int] = (21_841, 500, 512)
    product: int = 8192
    copied: int = 1 << 30
    repeats: int = 10


TINY = Sizes(
    BackboneConfig("test_vit", image_size=32), 40, 5, (64, 32), 2, (4, 60, 8), (6, 20, 8), 64,
    1 << 16, 1,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """flops and bytes: of one call; 0 where they are not the point. product: of which rate the
    operations are a share."""

    name: str
    seconds: float
    flops: float = 0
    bytes: float = 0
    product: str = "bf16"


@dataclass(frozen=True)
class Bench:
    sizes: Sizes
    device: torch.device

    def seconds(self, function: Callable[[], object]) -> float:
        return measure.seconds(function, repeats=self.sizes.repeats, warm_up=2)

    # ---------------------------------------------------------------- the cases

    def peak(self) -> Iterator[Figure]:
        side, device = self.sizes.product, self.device
        for name, dtype in (("bf16", torch.bfloat16), ("TF32", torch.float32)):
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            took = self.seconds(partial(torch.matmul, a, b))
            yield Figure(f"peak: product in {name}", took, 2.0 * side**3)
        source = torch.zeros(self.sizes.copied, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = self.seconds(lambda: target.copy_(source))
        yield Figure("peak: copy", copy, bytes=2.0 * self.sizes.copied)

    def step(self) -> Iterator[Figure]:
        config = LarvSegConfig(warm_up=1)
        for name, method in (
            ("step: LarvSeg", self.larvseg(config)),
            ("step: LarvSeg without memory", self.larvseg(LarvSegConfig(attention="off"))),
            ("step: plain cross-entropy", Plain(self.backbone(), self.sizes).to(self.device)),
        ):
            yield self.figure(name, self.training_step(method))

    def weak_loss(self) -> Iterator[Figure]:
        """Of one slot, down to the gradient of the features and of the classifier."""
        method, side = self.larvseg(LarvSegConfig(warm_up=1)), self.sizes.crops[1]
        with torch.no_grad():
            (features,) = method.backbone(self.batch("weak", 0).images)
        method.backbone = Given(features, method.stride)
        batch = self.batch("weak", 0)

        def loss() -> None:
            method.zero_grad()
            sum(method(batch, Clock(0, 2, 4)).values()).backward()  # type: ignore[union-attr]

        yield self.figure(f"weak loss of a slot, {side} pixels", loss, "TF32")

    def bank(self) -> Iterator[Figure]:
        sizes, dim = self.sizes, self.larvseg_dim()
        bank = ShardedRows(Rings(sizes.classes, 20), Overwrite(), dim, device=self.device)
        ClassMeans(bank)
        rows, draw = torch.randn(8, dim, device=self.device), np.random.default_rng(0)

        def commit() -> None:
            for slot in range(4):
                bank.propose(draw.integers(0, sizes.classes, 8), rows, Clock(0, slot, 4))
            bank.commit(Clock(0))

        # each event is written, and its class's ring read for the mean
        yield Figure("bank: 32 events", self.seconds(commit), bytes=32 * 22 * dim * 4)

    def contrast(self) -> Iterator[Figure]:
        num_classes, num_rows, dim = self.sizes.regions
        ids = np.arange(num_rows, dtype=np.int64)
        layout = Regions.of_pairs(ids % num_classes, ids, num_classes)
        bank = ShardedRows(layout, Momentum(), dim, device=self.device, noise_seed=0)
        contrast, draw = Contrast(bank), np.random.default_rng(0)
        queries = torch.randn(12, dim, device=self.device, requires_grad=True)
        classes = draw.integers(0, num_classes, (12, 2))
        weights = np.ones(classes.shape)

        def ask() -> None:
            contrast(queries, classes, weights, 0.07).sum().backward()

        name = f"contrast: 12 mixtures, {num_rows:,} rows"
        yield Figure(name, self.seconds(ask), bytes=2.0 * num_rows * dim * 4)  # scores, gradient

    def kmeans(self) -> Iterator[Figure]:
        number, most, dim = self.sizes.problems
        sizes = np.random.default_rng(0).integers(1, most + 1, number)
        rows = torch.randn(int(sizes.sum()), dim, device=self.device)
        iterations: list[float] = []

        def cluster() -> None:
            found = kmeans(
                rows, sizes, 10, seeds=range(number), engine="batched", max_iterations=20
            )
            per_problem = found.iterations.cpu().numpy()
            iterations.append(float((per_problem * sizes).sum()))

        took = measure.seconds(cluster, repeats=1)
        read = iterations[-1] * dim * 4
        yield Figure(f"k-means: {number:,} of up to {most} rows", took, bytes=read)

    def prediction(self) -> Iterator[Figure]:
        from memseg_dist.evaluation.sliding import segment  # which needs tyro

        method, side = self.larvseg(LarvSegConfig(attention="off")).eval(), self.sizes.crops[0]
        image = torch.zeros(3, side, side, dtype=torch.uint8, device=self.device)
        classes = torch.arange(self.sizes.classes, device=self.device)
        name = f"prediction: {self.sizes.classes:,} classes, {side} pixels"
        with torch.no_grad():
            yield self.figure(name, lambda: segment(method.predict, image, classes), "TF32")

    # ---------------------------------------------------------------- what they are made of

    def figure(self, name: str, function: Callable[[], object], product: str = "bf16") -> Figure:
        with FlopCounterMode(display=False) as counter:
            function()
        return Figure(name, self.seconds(function), counter.get_total_flops(), product=product)

    def backbone(self) -> Backbone:
        return build_backbone(self.sizes.backbone, bf16=True)

    def larvseg_dim(self) -> int:
        return build_backbone(self.sizes.backbone).dim

    def larvseg(self, config: LarvSegConfig) -> LarvSeg:
        torch.manual_seed(0)
        backbone, sizes = self.backbone(), self.sizes
        classes = {"masks": np.arange(sizes.mask_classes), "weak": np.arange(sizes.classes)}
        method = LarvSeg(
            backbone, CosineClassifier(sizes.classes, backbone.dim), config, classes=classes,
            base_classes=range(sizes.mask_classes), num_slots=4, device=self.device,
        )  # fmt: skip
        return method.to(self.device).train()

    def batch(self, source: str, slot: int) -> Batch:
        sizes, draw = self.sizes, np.random.default_rng(slot)
        side, count = sizes.crops[source == "weak"], sizes.images
        images = torch.from_numpy(draw.integers(0, 256, (count, 3, side, side), dtype=np.uint8))
        labels: tuple[tuple[int, ...], ...] = ((),) * count
        masks = None
        if source == "masks":
            masks = torch.from_numpy(draw.integers(0, sizes.mask_classes, (count, side, side)))
        else:  # one image of three labels, the others of one
            labels = tuple(
                tuple(sorted(draw.choice(sizes.classes, 1 if image else 3, replace=False).tolist()))
                for image in range(count)
            )
        keys = tuple(f"{slot}-{image}" for image in range(count))
        valid = torch.ones(count, side, side, dtype=torch.bool)
        kind = "masks" if source == "masks" else "labels"
        return Batch(images, valid, masks, labels, source, kind, keys).to(self.device)  # type: ignore[arg-type]

    def training_step(self, method: Method) -> Callable[[], None]:
        fused = self.device.type == "cuda"
        optimizer = torch.optim.SGD(method.parameters(), lr=1e-4, momentum=0.9, fused=fused)
        sources = ("masks", "masks", "weak", "weak")
        slots = [self.batch(source, slot) for slot, source in enumerate(sources)]

        def step() -> None:
            for slot, batch in enumerate(slots):
                losses = method(batch, Clock(0, slot, len(slots)))
                (sum(losses.values()) / len(slots)).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(Clock(0, num_slots=len(slots)))

        return step


class Plain(Method):
    """A linear classifier on the same net: cross-entropy of pixels, and of pooled features."""

    def __init__(self, backbone: Backbone, sizes: Sizes) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.dim, sizes.classes)
        self.num_masked = sizes.mask_classes

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (features,) = self.backbone(batch.images, batch.valid)
        weight, bias = self.classifier.weight, self.classifier.bias
        if batch.masks is None:
            image = [b for b, labels in enumerate(batch.labels) for _ in labels]
            target = [label for labels in batch.labels for label in labels]
            image_R, target_R = onto_device(features.device, np.array(image), np.array(target))
            logits = self.classifier(features.mean(dim=(2, 3)))[image_R]
            return {"cls": F.cross_entropy(logits, target_R)}
        weight, bias = weight[: self.num_masked], bias[: self.num_masked]
        logits = F.conv2d(features, weight[:, :, None, None], bias)
        target = batch.masks[:, ::2, ::2]
        logits = F.interpolate(logits, target.shape[1:], mode="bilinear")
        return {"seg": F.cross_entropy(logits, target)}


class Given(nn.Module):
    """Stands for the backbone when a loss alone is measured."""

    def __init__(self, features: Tensor, stride: int) -> None:
        super().__init__()
        self.features, self.stride = nn.Parameter(features), stride

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor]:
        return (self.features,)


CASES = ("step", "weak_loss", "bank", "contrast", "kmeans", "prediction")


def rows_of(figures: list[Figure]) -> Iterator[str]:
    """The lines of a Markdown table."""
    peaks = {figure.name.split()[-1]: figure for figure in figures[:3]}
    whole = next((figure.seconds for figure in figures if figure.name == "step: LarvSeg"), None)
    yield "| what | ms | share of the step | Tflop/s | GB/s | share of the peak |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for figure in figures:
        of_step = "" if whole is None else f"{100 * figure.seconds / whole:.1f} %"
        flops, num_bytes = figure.flops / figure.seconds, figure.bytes / figure.seconds
        kind = "copy" if figure.bytes else figure.product
        best = peaks[kind]
        share = (num_bytes + flops) * best.seconds / (best.bytes + best.flops)  # one of both is 0
        of_peak = f"{100 * share:.0f} %, {kind}"
        if figure.name.startswith("peak"):
            of_step = of_peak = ""
        speeds = [f"{v:.1f}" if v else "" for v in (flops / 1e12, num_bytes / 1e9)]
        cells = [figure.name, f"{1e3 * figure.seconds:.2f}", of_step, *speeds, of_peak]
        yield f"| {' | '.join(cells)} |"


def run_tests() -> str:
    """The last line of the tests that need a GPU."""
    if find_spec("pytest") is None:
        return "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "\n".join([*failed, *(done.stdout or done.stderr).splitlines()[-1:]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that any machine takes")
    parser.add_argument("--only", nargs="+", choices=("tests", *CASES), help="by default all")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; see --device cpu --tiny")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}{', tiny sizes' if options.tiny else ''}\n")
    wanted = options.only or ("tests", *CASES)
    if "tests" in wanted and device.type == "cuda":
        print(f"gpu tests: {run_tests()}\n", flush=True)
    bench = Bench(TINY if options.tiny else Sizes(), device)
    figures = [*bench.peak()]
    for case in (case for case in CASES if case in wanted):
        try:
            figures += getattr(bench, case)()
        except (torch.cuda.OutOfMemoryError, ImportError) as error:  # the others still count
            print(f"{case}: not run: {str(error).splitlines()[0]}\n", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(rows_of(figures)))


if __name__ == "__main__":
    main()
