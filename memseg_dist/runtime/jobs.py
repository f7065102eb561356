"""What every file in `jobs/` shares: its command line, `--smoke`, and how it ends.

    @dataclass(frozen=True)
    class MyJob(Job):
        \"\"\"Options of this job.\"\"\"
        baseline: bool = False

        def config(self) -> RunConfig: ...

    if __name__ == "__main__":
        main(MyJob, __doc__)

Every field of the job's RunConfig is a flag as well: `--steps`, `--launch.workers`, ...
"""

from __future__ import annotations

import inspect
import io
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from memseg_dist.batch import derive_seed
from memseg_dist.config import Intervals, Relabelling, RunConfig, with_absolute_paths
from memseg_dist.data.loader import Source
from memseg_dist.data.shards import Sample, finish, write_shard
from memseg_dist.data.splits import Split
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.methods.larvseg import LarvSegConfig
from memseg_dist.models.backbone import BackboneConfig, build_backbone, save_backbone
from memseg_dist.runtime.launch import launch
from memseg_dist.runtime.process import RunFailed
from memseg_dist.train.checkpoint import Checkpoint

_MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.HelptextFromCommentsOff)


@dataclass(frozen=True)
class Job:
    """Options of a job. Subclasses add theirs and build the run's config."""

    smoke: bool = False
    """Run in seconds on two CPU cores: miniature data drawn on the spot, a tiny backbone."""

    def config(self) -> RunConfig:
        raise NotImplementedError

    def vocabularies(self) -> Mapping[str, Vocabulary]:
        """The classes of every source, by its name, and of the validation set."""
        raise NotImplementedError

    def prepare(self, config: RunConfig) -> None:
        """Write what the run reads beside its shards; before it starts."""

    def stages(self, config: RunConfig) -> Mapping[str, RunConfig]:
        """Further runs of this job after `config`, as they follow from it; each name is a prefix
        of flags: `--NAME.steps`.
        """
        return {}

    def finish(
        self, config: RunConfig, result: Mapping[str, Any], stages: Mapping[str, RunConfig]
    ) -> None:
        """What is left to do with a run that came to its end."""

    def draw(self, config: RunConfig) -> None:
        """Miniature shards in the places that the `--smoke` config names."""
        vocabularies = self.vocabularies()
        for source in config.sources:
            with_masks = source.supervision == "masks" or source.labels_from == "crop"
            draw_miniature(Path(source.path), vocabularies[source.name], with_masks=with_masks)
        if config.validation is not None:
            vocabulary = vocabularies[config.validation.name]
            draw_miniature(Path(config.validation.path), vocabulary, with_masks=True)


def main(kind: type[Job], description: str | None = None) -> None:
    """Parse, train, exit: 0 when done, 1 with one readable message when not."""
    job, _ = tyro.cli(kind, return_unknown_args=True, add_help=False, console_outputs=False)
    try:
        config = shrunk(job.config()) if job.smoke else job.config()
    except ValueError as error:
        sys.exit(f"error: {error}")

    try:
        config, stages = parse_overrides(kind, job, config, description)
        if job.smoke:
            job.draw(config)
        job.prepare(config)
        result = launch(config)
        if result["status"] == "finished":
            job.finish(config, result, stages)
    except (ValueError, RunFailed) as error:
        sys.exit(f"error: {error}")


def parse_overrides(
    kind: type[Job], job: Job, config: RunConfig, description: str | None
) -> tuple[RunConfig, dict[str, RunConfig]]:
    """`config` and the job's further stages as the command line changes them.

    `--help` shows the job's own options too. A stage follows from the changed config before its own
    flags change it.
    """

    def parser(stages: Mapping[str, RunConfig]):
        def parse(options, run, **stages):
            return run, stages

        parameters = {
            "options": (Annotated[kind, tyro.conf.arg(name="")], kind()),
            "run": (Annotated[RunConfig, tyro.conf.arg(name="")], config),
        } | {name: (RunConfig, with_absolute_paths(stage)) for name, stage in stages.items()}
        parse.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
                )
                for name, (annotation, default) in parameters.items()
            ]
        )
        parse.__annotations__ = {name: annotation for name, (annotation, _) in parameters.items()}
        return parse

    if not job.stages(config):
        run, _ = tyro.cli(parser({}), description=description, config=_MARKERS)
        return with_absolute_paths(run), {}
    (run, _), _ = tyro.cli(
        parser({}), config=_MARKERS, return_unknown_args=True, add_help=False, console_outputs=False
    )
    stages = job.stages(with_absolute_paths(run))
    run, changed = tyro.cli(parser(stages), description=description, config=_MARKERS)
    return with_absolute_paths(run), {
        name: with_absolute_paths(stage) for name, stage in changed.items()
    }


def shrunk(config: RunConfig) -> RunConfig:
    """The same run on miniature data, with its vocabularies, slots and memory kept whole."""
    name = f"{config.name}-smoke-{time.strftime('%Y%m%d-%H%M%S')}"
    data = f"runs/{name}/data"
    validation, method = config.validation, config.method
    if validation is not None:
        validation = replace(
            validation,
            path=f"{data}/validation",
            resize=(64, 64),
            window=64,
            stride=64,
            max_images=4,
            num_panels=2,
        )
    if isinstance(method, LarvSegConfig):
        method = replace(method, warm_up=1)
    return replace(
        config,
        name=name,
        storage="runs",
        sources=tuple(_shrunk_source(source, data) for source in config.sources),
        validation=validation,
        method=method,
        backbone=BackboneConfig(name="test_vit", image_size=64, drop_path=0.0),
        steps=4,
        every=Intervals(log=1, evaluate=4, checkpoint=2, poll=2),
        launch=replace(config.launch, workers=2, max_failures=0),
        loader=replace(config.loader, processes=0, cache_dir=f"{data}/cache"),
        relabel=tuple(
            replace(item, path=f"{data}/relabel/{item.source}.json") for item in config.relabel
        ),
    )


def _shrunk_source(source: Source, data: str) -> Source:
    augment = replace(source.augment, crop=64, resize=(64, 64))
    return replace(source, path=f"{data}/{source.name}", augment=augment)


def draw_miniature(
    root: Path, vocabulary: Vocabulary, *, with_masks: bool, num_images: int = 8, size: int = 72
) -> None:
    """One shard of noisy colour fields, each field one class, spread over the whole vocabulary."""

    def samples() -> Iterator[Sample]:
        for number in range(num_images):
            rng = np.random.default_rng(derive_seed("miniature", root.name, number))
            classes = rng.choice(len(vocabulary), size=4, replace=len(vocabulary) < 4)
            mask = np.kron(classes.reshape(2, 2), np.ones((size // 2, size // 2), int))
            pixels = rng.integers(0, 60, (size, size, 3)) + (mask[..., None] * [37, 91, 53]) % 190
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            labels = tuple(sorted({int(index) for index in classes}))
            yield Sample(
                f"{root.name}-{number:04d}",
                buffer.getvalue(),
                "png",
                labels if with_masks else labels[:1],
                mask.astype(np.uint16) if with_masks else None,
            )

    write_shard(root, 0, samples(), num_classes=len(vocabulary))
    finish(root, vocabulary)


def recipes() -> Path:
    """The folder `datasets/` of this checkout: beside this package, or beside the job's folder."""
    for root in (Path(__file__).resolve().parents[2], Path(sys.argv[0]).resolve().parents[1]):
        if (root / "datasets" / "vocabularies").is_dir():
            return root / "datasets"
    raise ValueError(
        f"no datasets/vocabularies beside {sys.argv[0]}: run jobs from a clone of memseg-dist"
    )


def vocabulary(name: str) -> Vocabulary:
    """A class list that ships with the recipes, such as `coco_stuff_171`."""
    return Vocabulary.load(recipes() / "vocabularies" / f"{name}.json")


def recipe(name: str) -> ModuleType:
    """The recipe `datasets/NAME.py` as a module. (No package: `datasets` is another's name.)"""
    import importlib.util

    known = f"memseg_recipe_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, recipes() / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        spec.loader.exec_module(module)
    return sys.modules[known]


def relabelling(split: Split, data: str) -> tuple[Relabelling, ...]:
    """Where `write_relabelling` puts the classes that a split protocol renames."""
    folder = f"{data}/relabel/{split.protocol}"
    return tuple(
        Relabelling(source, f"{folder}/{source}.json")
        for source, changes in split.relabel.items()
        if changes
    )


def write_relabelling(split: Split, config: RunConfig) -> None:
    for item in config.relabel:
        changes = {uid: asdict(category) for uid, category in split.relabel[item.source].items()}
        path = Path(item.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(changes, indent=1) + "\n")


def save_trained_backbone(config: RunConfig, checkpoint: str, path: Path) -> None:
    """The backbone of a checkpoint, as the file that `--backbone.pretrained` takes."""
    prefix = "backbone."
    weights = Checkpoint(checkpoint).weights()
    backbone = build_backbone(replace(config.backbone, pretrained=""))
    backbone.load_state_dict(
        {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
    )
    save_backbone(backbone, path)
