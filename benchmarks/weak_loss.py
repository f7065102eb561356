"""Time and peak memory of LarvSeg's image-level losses at vocabularies up to ImageNet-21K.

    python benchmarks/weak_loss.py [--json FILE]

Ours against the literal computation (dense logits at half the crop, as the official code), a plain
training step of the same backbone (ViT-B/16), and the floor: the one product that any full softmax
over a projected class table needs (E Q forward, and its two backward products). Two 320-pixel
crops, one with three labels and one with one, D = 768. Each figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import measure
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from memseg_dist.batch import Batch, Clock
from memseg_dist.methods.larvseg.classifier import CosineClassifier
from memseg_dist.methods.larvseg.config import LarvSegConfig
from memseg_dist.methods.larvseg.method import LarvSeg
from memseg_dist.nn.backbone import BackboneConfig, build_backbone

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference import larvseg as reference

VOCABULARIES = (171, 847, 21_841)
DIM, CROP, STRIDE = 768, 320, 16
LABELS = ((1, 20, 100), (7,))
WARM = 150
"""Classes with a full memory: those that background mining can choose from."""


class Features(nn.Module):
    """Stands for the backbone: the losses are measured, down to the gradient of its output."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features, self.stride = nn.Parameter(features), STRIDE

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor]:
        return (self.features,)


def batch(device: str) -> Batch:
    images = torch.zeros(2, 3, CROP, CROP, dtype=torch.uint8, device=device)
    valid = torch.ones(2, CROP, CROP, dtype=torch.bool, device=device)
    return Batch(images, valid, None, LABELS, "weak", "labels", ("a", "b"))


def build(num_classes: int, device: str) -> LarvSeg:
    torch.manual_seed(0)
    features = torch.randn(2, DIM, CROP // STRIDE, CROP // STRIDE)
    classifier = CosineClassifier(num_classes, DIM)
    config = LarvSegConfig(cls_weight=1, aux_weight=1, peak_threshold=0.05, distance_threshold=1.0)
    classes = {"weak": np.arange(num_classes)}
    method = LarvSeg(Features(features), classifier, config, classes=classes, device=device)
    method.to(device)
    method.memory.read.means[:WARM] = torch.randn(WARM, DIM, device=device) * DIM**-0.5
    method.memory.read.counts[:WARM] = config.capacity
    return method


def ours(num_classes: int, device: str) -> dict:
    method, inputs = build(num_classes, device), batch(device)

    def step() -> None:
        method.zero_grad()
        sum(method(inputs, Clock(0)).values()).backward()

    return {"MiB": measure.peak_mebibytes(step), "seconds": measure.seconds(step, repeats=3)}


def naive(num_classes: int, device: str) -> dict:
    method, inputs = build(num_classes, device), batch(device)
    low, size = (CROP // STRIDE,) * 2, CROP // 2
    memory = reference.PixelMemory(1)
    for class_id in range(WARM):  # one event of one vector: the same means as ours
        memory.enqueue(class_id, method.memory.read.means[class_id][None])
    valid = torch.ones(2, size, size, dtype=torch.bool, device=device)
    positions = torch.ones(2, low[0] * low[1], dtype=torch.bool, device=device)

    def step() -> None:
        method.zero_grad()
        weight = method.classifier.class_weights(torch.arange(num_classes, device=device))
        x = method.classifier.embed(*method.backbone(inputs.images))
        losses = reference.weak_losses(
            x, weight, method.classifier.gamma, [list(ids) for ids in LABELS], valid, positions,
            low, memory, warm_up=1, peak_threshold=0.05, distance_threshold=1.0,
        )  # fmt: skip
        sum(losses).backward()

    # once: at the full vocabulary a step takes minutes
    return {"MiB": measure.peak_mebibytes(lambda: timed(step)), "seconds": TIMES[-1]}


TIMES: list[float] = []


def timed(step) -> None:
    TIMES.append(measure.seconds(step, repeats=1, warm_up=0))


def floor(num_classes: int, device: str) -> dict:
    """E Q, and in backward dE = dW Qᵀ and dQ = Eᵀ dW."""
    table = torch.randn(num_classes, DIM, device=device)
    square = torch.randn(DIM, DIM, device=device)

    def step() -> None:
        weight = table @ square
        weight @ square.T
        table.T @ weight

    return {"MiB": measure.peak_mebibytes(step), "seconds": measure.seconds(step)}


def backbone(num_classes: int, device: str) -> dict:
    """Forward and backward of ViT-B/16 on the two crops, the mean of its output as loss."""
    net = build_backbone(BackboneConfig(image_size=CROP, drop_path=0)).to(device)
    images = batch(device).images

    def step() -> None:
        net.zero_grad()
        net(images)[0].mean().backward()

    return {"MiB": measure.peak_mebibytes(step), "seconds": measure.seconds(step, repeats=3)}


KINDS = {"ours": ours, "naive": naive, "floor": floor, "backbone step": backbone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "CLASSES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, num_classes = arguments.worker
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(json.dumps(KINDS[kind](int(num_classes), device)))
        return
    rows = []
    table = Table("classes", "what", "seconds", "extra memory (MiB)", title="Weak losses, one step")
    wanted = [(n, kind) for n in VOCABULARIES for kind in ("ours", "naive", "floor")]
    for num_classes, kind in [*wanted, (0, "backbone step")]:
        result = measure.in_subprocess(__file__, kind, num_classes, timeout=1800)
        rows.append({"classes": num_classes, "kind": kind} | result)
        shown = [
            f"{result[key]:.3f}" if key in result else result["failed"]
            for key in ("seconds", "MiB")
        ]
        table.add_row(f"{num_classes:,}" if num_classes else "any", kind, *shown)
    Console().print(table, measure.machine())
    if arguments.json:
        measure.write_json(arguments.json, rows)


if __name__ == "__main__":
    sys.exit(main())
