"""What every command shares: opening a checkpoint, and how pictures go through its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from tyro.conf import arg

from memseg_dist.checks import check_pairs, check_scales, check_view
from memseg_dist.config import ValidationConfig
from memseg_dist.data.augment import height_and_width
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.evaluation.lookup import find_classes
from memseg_dist.evaluation.sliding import Average, Inference, Mode
from memseg_dist.nn.densecrf import DEEPLAB
from memseg_dist.train.load_model import Model, chosen_device, find_checkpoint, load_model


@dataclass(frozen=True)
class ModelOptions:
    """Which weights, and where to run them."""

    checkpoint: str
    """A run's directory, its checkpoints/ or one of them (.../step-00001000)."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default the GPU if there is one."""


@dataclass(frozen=True)
class InferenceOptions:
    """How a picture goes through the model; by default as in the validation of the run."""

    mode: Mode | None = None
    """The whole picture at once, or sliding windows whose logits are averaged."""
    resize: tuple[int, int] | None = None
    """Longest and shortest side that the picture is fitted to."""
    keep_ratio: bool | None = None
    """Keep its aspect ratio; else its sides become exactly these."""
    window: int | tuple[int, int] | None = None
    """Side of a window in pixels, or its height and width."""
    stride: int | tuple[int, int] | None = None
    """Step between windows in pixels, or the steps down and across."""
    scales: tuple[float, ...] | None = None
    """Multi-scale testing: sizes to look at, relative to the fitted picture (0.75 1.0 1.25)."""
    flip: bool | None = None
    """Look at the mirror image of each size as well."""
    swap: tuple[tuple[str, str], ...] | None = None
    """Pairs of classes, by name or uid, that a mirror turns into each other: left-arm right-arm
    left-leg ..."""
    average: Average | None = None
    """What is averaged over the scales and mirror images."""
    crf: bool = False
    """Sharpen the probabilities along the picture's edges by a dense CRF, set as DeepLabV2's. For
    21 classes of 448 x 336 pixels it takes six seconds of one core."""
    memory: int = 512
    """MiB that upsampling the logits may take, at any number of classes, and the CRF."""

    def resolved(self, model: Model) -> Inference:
        """ValueError names the flag."""
        vocabulary = model.label_space.vocabulary
        usual = Inference.of(model.config.validation or ValidationConfig(path=""), vocabulary)
        if self.memory < 1:
            raise ValueError(f"--memory {self.memory}: must be 1 MiB or more")
        scales = usual.scales if self.scales is None else self.scales
        check_scales(scales, "--scales")
        swap = usual.swap
        if self.swap is not None:
            check_pairs(self.swap, "--swap")
            ids = [[_find(vocabulary, [text], "--swap")[0] for text in pair] for pair in self.swap]
            swap = tuple((one, other) for one, other in ids)
        mode, resize = self.mode or usual.mode, self.resize or usual.resize
        window = usual.window if self.window is None else self.window
        stride = usual.stride if self.stride is None else self.stride
        if self.window is not None and self.stride is None:
            sides = zip(height_and_width(usual.stride), height_and_width(window))
            stride = tuple(map(min, sides))  # type: ignore[assignment]
        check_view(mode, resize, window, stride, "--")
        return Inference(
            mode=mode,
            resize=resize,
            window=window,
            stride=stride,
            scales=scales,
            flip=usual.flip if self.flip is None else self.flip,
            swap=swap,
            average=self.average or usual.average,
            memory_bytes=self.memory * 2**20,
            keep_ratio=usual.keep_ratio if self.keep_ratio is None else self.keep_ratio,
            crf=DEEPLAB if self.crf else None,
        )


ModelFlags: TypeAlias = Annotated[ModelOptions, arg(name="")]
InferenceFlags: TypeAlias = Annotated[InferenceOptions, arg(name="")]


def open_model(options: ModelOptions, *, with_memories: bool = False) -> Model:
    """The method of a checkpoint with its weights, and its memories if asked for.

    ValueError naming the flag, or the damaged file.
    """
    checkpoint, device = find_checkpoint(options.checkpoint), chosen_device(options.device)
    return load_model(checkpoint, device, with_memories)


def chosen_classes(vocabulary: Vocabulary, wanted: str | None, flag: str) -> Sequence[int]:
    """The ids of a comma-separated list of classes, or all of them. ValueError names the flag."""
    if wanted is None:
        return range(len(vocabulary))
    return _find(vocabulary, wanted.split(","), flag)


def _find(vocabulary: Vocabulary, wanted: Sequence[str], flag: str) -> list[int]:
    try:
        return find_classes(vocabulary, wanted)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
