"""The job that is killed: any run, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memseg_dist.config import from_json
from memseg_dist.data.vocabulary import Vocabulary
from memseg_dist.pipeline import JobOptions, main
from memseg_dist.stages import Stage


@dataclass(frozen=True)
class Options(JobOptions):
    config: str = ""
    """The run as JSON."""


def stages(options: Options) -> dict[str, Stage]:
    return {"run": from_json(Path(options.config).read_text(), options.config)}


def vocabularies(options: Options) -> Mapping[str, Vocabulary]:
    return {}


if __name__ == "__main__":
    main(Options, stages, vocabularies, __doc__)
