"""The stages that a job is made of, described only, and how one refers to another's result.

    {"classifier": RunConfig(...),
     "labels": LabelConfig(result("classifier"), ..., out=result("classifier") + "/labels"),
     "segmenter": RunConfig(..., sources=(Source("pseudo", result("labels"), "masks"),))}

A run's result is its directory, that of pseudo labels their folder, that of an export its file.
Which it is follows the stage's flags, because references are replaced after the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from memseg_dist.checks import check_leaves, require
from memseg_dist.config import RunConfig, with_absolute_paths
from memseg_dist.data.files import absolute
from memseg_dist.methods.labeller import ArgmaxLabeller, LabellerConfig
from memseg_dist.methods.pseudoseg.labeller import FusionLabeller
from memseg_dist.methods.rca.labeller import ActivationLabeller

_REFERENCE = "stage:"
LABELLERS: dict[str, type[LabellerConfig]] = {
    "activation": ActivationLabeller,
    "argmax": ArgmaxLabeller,
    "fusion": FusionLabeller,
}
"""By `kind`: those that a command line can name."""


@dataclass(frozen=True)
class LabelConfig:
    """The label stage: what to label, with what, and how."""

    checkpoint: str
    """A run's directory, its checkpoints/ or one of them (.../step-00001000)."""
    data: str
    """Folder or URL of the shards to label; their image labels, if any, say what there is to be
    found."""
    out: str
    """Folder to write to: shards of the same names and keys, with masks."""
    labeller: LabellerConfig = field(default_factory=ActivationLabeller)
    """Any function from model and image to a mask with unknown pixels."""
    truth: str | None = None
    """Shards with masks of some of the same images: score the labels against them at the end.
    Classes are told apart by uid, and by name where the uids differ."""
    workers: int | None = None
    """Parallel tasks on this machine; 0 = in this process, without Ray; default: this process for
    a labeller that runs the network if it has a GPU, else the running Ray cluster or all cores."""
    device: str | None = None
    """Where the network runs: cpu, cuda, ...; by default the GPU if there is one."""
    max_images: int | None = None
    """Label the first so many images only."""
    overwrite: bool = False
    """Delete what is in the output folder if it was made of other input or options."""
    num_pictures: int = 8
    """How many of the images are drawn as image | truth | pseudo label | maps, into OUT/panels."""

    def __post_init__(self) -> None:
        check_leaves(self)
        for name in ("checkpoint", "data", "out"):
            require(getattr(self, name), f"--{name}", "", "a text that is not empty")
        require(self.workers is None or self.workers >= 0, "--workers", self.workers, "0 or more")
        images = self.max_images
        require(images is None or images > 0, "--max-images", images, "1 or more")
        require(self.num_pictures >= 0, "--num-pictures", self.num_pictures, "0 or more")
        for name in ("data", "truth"):
            path = getattr(self, name)
            is_other = path is None or absolute(self.out) != absolute(path)
            require(is_other, "--out", self.out, f"another folder than --{name}")


@dataclass(frozen=True)
class ExportConfig:
    """The backbone of a run, as the file that `backbone.pretrained` takes."""

    checkpoint: str
    """A run's directory, its checkpoints/ or one of them."""
    out: str
    """The .safetensors file to write."""


Stage: TypeAlias = RunConfig | LabelConfig | ExportConfig


def result(name: str) -> str:
    """Stands for the result of the stage `name` in any field of a later stage."""
    return _REFERENCE + name


def is_reference(path: str) -> bool:
    return path.startswith(_REFERENCE)


def read_by(stage: Stage) -> list[str]:
    """The stages whose results it reads, in the order of its fields; `out` is not read."""
    fields = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
    texts = _texts([value for name, value in fields.items() if name != "out"])
    named = [text.removeprefix(_REFERENCE).split("/", 1)[0] for text in texts if is_reference(text)]
    return list(dict.fromkeys(named))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a tree of dataclasses and sequences."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _texts(part)
    elif dataclasses.is_dataclass(value):
        yield from _texts([getattr(value, f.name) for f in dataclasses.fields(value)])


def resolved(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages with absolute paths in the place of references.

    ValueError for a reference to a stage that is unknown or does not come before.
    """
    done: dict[str, Stage] = {}
    for name, stage in stages.items():
        results = {known: result_of(earlier) for known, earlier in done.items()}
        stage = _replaced(stage, results, name)
        done[name] = with_absolute_paths(stage) if isinstance(stage, RunConfig) else stage
    return done


def result_of(stage: Stage) -> str:
    """Where a stage leaves its result: a directory, a folder of shards or a file."""
    return stage.directory if isinstance(stage, RunConfig) else stage.out


def _replaced(value: Any, results: Mapping[str, str], where: str) -> Any:
    if isinstance(value, str) and is_reference(value):
        name, *rest = value.removeprefix(_REFERENCE).split("/", 1)
        if name not in results:
            raise ValueError(
                f"stage {where!r} refers to the result of stage {name!r}, which is none of the "
                f"stages before it: {list(results)}"
            )
        return "/".join([results[name], *rest])
    if isinstance(value, tuple):
        return tuple(_replaced(part, results, where) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {key: _replaced(part, results, where) for key, part in fields.items()}
        return dataclasses.replace(value, **changed)
    return value
