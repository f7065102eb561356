"""What every file in `jobs/` is run by: its command line, and its stages one after another.

    @dataclass(frozen=True)
    class Options(JobOptions):
        \"\"\"The job's own flags.\"\"\"
        baseline: bool = False

    def stages(options: Options) -> dict[str, Stage]: ...
    def vocabularies(options: Options) -> dict[str, Vocabulary]: ...

    if __name__ == "__main__":
        main(Options, stages, vocabularies, __doc__)

Every field of every stage is a flag as well: `--steps` of a job of one run, `--classifier.steps` of
a job of several stages (`PipelineOptions`). A job that was stopped goes on by the same command: a
run from its newest checkpoint, pseudo labels shard by shard; an export is made again.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, TypeVar

import tyro

from memseg_dist.config import LaunchConfig, RunConfig, TrackingConfig
from memseg_dist.data.files import exists, is_url, join
from memseg_dist.data.index import Index
from memseg_dist.data.schema import INDEX_NAME
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.launch import build_mlflow, launch, provenance
from memseg_dist.nn.weights import fetch_weights
from memseg_dist.platforms.process import RunFailed, outlive_readers, stop_was_asked
from memseg_dist.stages import ExportConfig, LabelConfig, Stage, read_by, resolved, result_of
from memseg_dist.tools import miniature
from memseg_dist.tools.export import export_backbone
from memseg_dist.tools.external import ensure_indexed
from memseg_dist.tools.pseudo_labels import label
from memseg_dist.train.load_model import has_checkpoint
from memseg_dist.train.platform import Tracker

MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.HelptextFromCommentsOff)
"""How tyro reads the command line of a job."""


@dataclass(frozen=True)
class JobOptions:
    """Options of a job. A job's own are a subclass."""

    smoke: bool = False
    """Run in seconds on two CPU cores: miniature data drawn on the spot, a tiny backbone."""

    def select(self, names: Sequence[str]) -> Sequence[str]:
        """The stages to run, of all of them in order."""
        return names


@dataclass(frozen=True)
class PipelineOptions(JobOptions):
    """Options of a job of several stages: what all of its runs share."""

    name: str | None = None
    """Name of the first run, with which those of the others begin; by default the job's."""
    storage: str = "runs"
    """Directory, or fsspec URL (s3://bucket/runs), that every worker can reach."""
    seed: int = 0
    """Of the fresh weights, the order of the samples and all that is drawn while training."""
    launch: LaunchConfig = LaunchConfig()
    tracking: TrackingConfig = TrackingConfig()
    start_at: str | None = None
    """The first of the stages to run; those before it must have been run."""
    until: str | None = None
    """The last of the stages to run."""

    def run(self, name: str, **fields: Any) -> RunConfig:
        """A run with what all of them share."""
        shared = {key: getattr(self, key) for key in ("storage", "seed", "launch", "tracking")}
        return RunConfig(name=name, **shared, **fields)

    def select(self, names: Sequence[str]) -> Sequence[str]:
        for flag, name in (("start-at", self.start_at), ("until", self.until)):
            if name not in (None, *names):
                raise ValueError(f"--{flag} {name}: there is no such stage; choose of {[*names]}")
        first, last = names.index(self.start_at or names[0]), names.index(self.until or names[-1])
        if first > last:
            raise ValueError(f"--start-at {self.start_at} comes after --until {self.until}")
        return names[first : last + 1]


Options = TypeVar("Options", bound=JobOptions)


def main(
    kind: type[Options],
    stages: Callable[[Options], Mapping[str, Stage]],
    vocabularies: Callable[[Options], Mapping[str, Vocabulary]],
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run the stages that the command line asks for.

    Exit status 0 when done, 75 (EX_TEMPFAIL: try again) when stopped, 1 with one readable message,
    2 for a wrong command line. kind: the job's options. vocabularies: the classes of every source
    and validation set, by name, which `--smoke` draws. arguments: by default those of the process.
    """
    is_ours = arguments is None  # this process, which ends with the job
    try:
        if is_ours:
            outlive_readers()
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        options, described = parse(kind, stages, description, arguments)
        selected = options.select([*described])
        if options.smoke:
            miniature.draw(described, vocabularies(options))
        is_done = run_stages(
            described,
            selected,
            may_be_unknown=options.smoke,
            is_alone=has_bare_flags(options, described),
        )
    except (ValueError, RunFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        is_done = False
    finally:
        if is_ours:  # what is still to be closed is not to be disturbed
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not is_done:
        print("stopped; the same command goes on where it was", file=sys.stderr, flush=True)
        sys.exit(os.EX_TEMPFAIL)


def parse(
    kind: type[Options],
    stages: Callable[[Options], Mapping[str, Stage]],
    description: str | None = None,
    arguments: Sequence[str] | None = None,
) -> tuple[Options, dict[str, Stage]]:
    """The options, and the stages that follow from them as their own flags change them."""
    options, rest = tyro.cli(
        kind, args=arguments, config=MARKERS, return_unknown_args=True, add_help=False
    )
    try:
        described = stages(options)
    except ValueError:  # shards that are not written yet must not keep the help away
        if not {"-h", "--help"} & {*rest}:
            raise
        described = stages(kind(smoke=True))
    if options.smoke:
        described = miniature.shrunk(described)
    command = command_of(options, described)
    parsed: Any = tyro.cli(command, args=arguments, description=description, config=MARKERS)
    return options, {name: getattr(parsed, name) for name in described}


def command_of(options: JobOptions, stages: Mapping[str, Stage]) -> type:
    """The dataclass whose fields are a job's flags: its options, and every field of every stage."""
    bare = tyro.conf.arg(name="")
    kind: Any = type(options)
    fields: list[tuple[str, Any, Any]] = [("options", Annotated[kind, bare], options)]
    is_alone = has_bare_flags(options, stages)
    for name, stage in stages.items():
        stage_kind: Any = type(stage)
        fields.append((name, Annotated[stage_kind, bare] if is_alone else stage_kind, stage))
    return make_dataclass("command", fields)


def has_bare_flags(options: JobOptions, stages: Mapping[str, Stage]) -> bool:
    """Whether the flags of the only stage do without its name."""
    # the flags of a pipeline's options would be those of its only run
    return len(stages) == 1 and not isinstance(options, PipelineOptions)


def named_flags(text: str, name: str, is_alone: bool) -> str:
    """An error of the stage `name`, whose flags begin with its name unless it is alone."""
    prefix = "" if is_alone else f"{name}."
    return re.sub(r"--(?=(sources|validation|backbone|method)\.)", f"--{prefix}", text)


def run_stages(
    stages: Mapping[str, Stage],
    selected: Sequence[str] | None = None,
    *,
    may_be_unknown: bool = False,
    is_alone: bool = False,
) -> bool:
    """Run the stages, or those that are selected of them; False if one of them was stopped.

    What can fail early fails before the first one: ValueError. may_be_unknown: go on with pseudo
    labels that say nothing. is_alone: see `has_bare_flags`.
    """
    names = [*stages] if selected is None else selected
    read = {name: read_by(stages[name]) for name in names}
    stages = resolved(stages)
    for name in names:
        check_stage(name, stages)
        for earlier in read[name]:
            if earlier not in names:
                check_is_there(earlier, stages[earlier], name)
    for name in names:  # the network comes last
        check_weights(name, stages)
    for number, name in enumerate(names, 1):
        stage = stages[name]
        if len(stages) > 1:
            print(f"stage {number} of {len(names)}: {name}", flush=True)
        if isinstance(stage, RunConfig):
            try:
                status = launch(stage)["status"]
            except (ValueError, RunFailed) as error:
                kind = RunFailed if isinstance(error, RunFailed) else ValueError
                raise kind(named_flags(str(error), name, is_alone)) from error
            # a signal may come after the last step, too late for the run
            if status != "finished" or (stop_was_asked() and number < len(names)):
                return False
        elif isinstance(stage, LabelConfig):
            run_labels(stage, stages, may_be_unknown)
        else:
            export_backbone(stage)
            print(f"backbone    {stage.out}", flush=True)
    return True


def check_weights(name: str, stages: Mapping[str, Stage]) -> None:
    """Fetches the weights that a run starts from; ValueError if they cannot be had."""
    stage = stages[name]
    if not isinstance(stage, RunConfig):
        return
    weights = stage.backbone.pretrained
    if any(f"{weights}/".startswith(f"{result_of(other)}/") for other in stages.values()):
        return  # a stage writes them
    try:
        fetch_weights(stage.backbone.name, weights)
    except ValueError as error:
        if len(stages) == 1:
            raise
        text = str(error).replace("--backbone.", f"--{name}.backbone.")
        raise ValueError(f"stage {name!r}: {text}") from error


def check_stage(name: str, stages: Mapping[str, Stage]) -> None:
    """ValueError for what would be found out only after the days of the stages before."""
    stage = stages[name]
    if isinstance(stage, RunConfig):
        return
    if is_url(stage.out):
        raise ValueError(
            f"stage {name!r} writes to {stage.out}, which is a URL; give --{name}.out a folder "
            "that every worker can reach, or stop before it with --until"
        )
    if isinstance(stage, ExportConfig):
        return
    if stage.truth is not None and not exists(join(stage.truth, INDEX_NAME)):
        raise ValueError(
            f"stage {name!r}: truth {stage.truth} has no shards to score the pseudo labels "
            "against; write them with the recipe, the first command that the job's --help shows "
            "(python datasets/...), or name others"
        )
    if stage.data not in map(result_of, stages.values()):  # else it is not written yet
        ensure_indexed([stage.data])
        stage.labeller.check_data(Index.open(stage.data).key(0))


def check_is_there(name: str, stage: Stage, reader: str) -> None:
    """ValueError if the stage `name`, whose result the stage `reader` needs, has not been run."""
    where = result_of(stage)
    if isinstance(stage, RunConfig):
        is_there = has_checkpoint(where)
    else:
        is_there = exists(join(where, INDEX_NAME) if isinstance(stage, LabelConfig) else where)
    if not is_there:
        raise ValueError(
            f"stage {reader!r} reads the result of stage {name!r}, which is not at {where} and not "
            f"among the stages to run; begin with it: --start-at {name}"
        )


def run_labels(stage: LabelConfig, stages: Mapping[str, Stage], may_be_unknown: bool) -> None:
    """Write pseudo labels; the MLflow run of the stage whose weights they are of goes on."""
    runs = [run for run in stages.values() if isinstance(run, RunConfig)]
    tracked = [run for run in runs if run.tracking.kind == "mlflow"]
    tracker: Tracker = Tracker()
    for run in (run for run in tracked if run.directory == stage.checkpoint):
        tracker = build_mlflow(run, provenance())
    try:
        report = label(stage, tracker)
    except BaseException as error:
        tracker.finish("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    tracker.finish("finished")
    print(report, flush=True)
    if report.share_unknown == 1 and not may_be_unknown:
        raise ValueError(
            f"every pixel of the pseudo labels in {stage.out} is unknown: there is nothing to "
            "train on; train what they are of for longer, or look at OUT/panels"
        )
