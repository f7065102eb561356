"""The training loop. It moves; it knows no method, no platform and no cluster.

data -> engine(slot) for this rank's slots -> engine.step -> method.after_step
     -> every so often: log, checkpoint, evaluate, ask whether to stop
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from memseg_dist import dist
from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import Clock
from memseg_dist.config import RunConfig, to_json
from memseg_dist.data.files import join
from memseg_dist.data.loader import TrainLoader
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.jsonable import flatten
from memseg_dist.methods.method import Method
from memseg_dist.models.batchnorm import commit_statistics
from memseg_dist.runtime.api import Context, Tracker
from memseg_dist.train.checkpoint import Checkpoint, latest, load, save
from memseg_dist.train.engine import Engine, EngineFactory, preview_step
from memseg_dist.train.meters import History, Meter
from memseg_dist.train.optim import learning_rate
from memseg_dist.train.storage import make_writable, on_rank_0
from memseg_dist.train.validate import EVALUATION, Validator

T = TypeVar("T")


def train(
    config: RunConfig, context: Context, tracker: Tracker, engine_factory: EngineFactory
) -> dict[str, Any]:
    """Run `config` to its last step, or until the context wants to stop. Collective.

    Returns {"status": "finished" or "stopped", "step", "checkpoint", and the last figures}.
    ValueError, on every rank, for what the user can mend.
    """
    try:
        result = _train(config, context, tracker, engine_factory)
    except BaseException:
        tracker.finish("failed")
        raise
    tracker.finish(result["status"])
    return result


def _train(
    config: RunConfig, context: Context, tracker: Tracker, engine_factory: EngineFactory
) -> dict[str, Any]:
    on_rank_0(lambda: make_writable(config.directory))
    label_space = build_label_space(config)
    method = build_method(config, label_space, context.device)
    engine = engine_factory(method, config, context.device)
    method.train()
    validate = Validator(config, label_space, context.device) if config.validation else None
    loader = build_loader(config, label_space, context)
    done, checkpoint = resume(config, engine, method, label_space)
    record = Recorder(config, context, tracker, done)
    meter, every = Meter(), config.every
    is_stopping = False

    def evaluate_if_due() -> None:
        is_due = done == config.steps or (done > 0 and done % every.evaluate == 0)
        if validate is not None and is_due and done not in record.evaluated:
            record(done, validate(method, tracker, done))

    evaluate_if_due()  # a run that was stopped between its checkpoint and its evaluation
    for slots, waited in timed(loader.steps(done, config.steps)):
        lr = learning_rate(config.optimizer, done, config.steps)
        step_clock = Clock(done, num_slots=config.num_slots, seed=config.seed)
        slots = [(batch.to(context.device), clock) for batch, clock in slots]
        preview_step(method, slots, config.engine.precision, step_clock)
        for batch, clock in slots:
            losses = engine(batch, clock)
            engine.backward(sum(losses.values()), clock)  # type: ignore[arg-type]
            meter.add_slot(batch, clock, losses)
        grad_norm = engine.step(lr)
        commit_statistics(method)
        method.after_step(step_clock)
        meter.add_step(done, grad_norm, waited)
        done += 1

        is_last = done == config.steps
        is_stopping = not is_last and done % every.poll == 0 and context.should_stop()
        saves = is_last or is_stopping or done % every.checkpoint == 0
        if saves or done % every.log == 0:
            # the line first: a run that goes on from the checkpoint does not make it again
            record(done, {"lr": lr, **meter.read(), **method.summary(step_clock)})
        if saves:
            checkpoint = save(
                join(config.directory, "checkpoints"),
                done,
                engine,
                method.state(),
                config,
                label_space,
                keep=every.keep_checkpoints,
            )
            context.report(record.last, checkpoint)
        if is_stopping:
            break
        evaluate_if_due()
        if saves or done in record.evaluated:
            meter.restart_clock()

    status = "stopped" if is_stopping else "finished"
    return {**record.last, "status": status, "step": done, "checkpoint": checkpoint}


def build_loader(config: RunConfig, label_space: LabelSpace, context: Context) -> TrainLoader:
    return TrainLoader(
        config.sources,
        label_space,
        seed=config.seed,
        cache_dir=config.cache_directory,
        cache_bytes=config.loader.cache_bytes,
        num_processes=config.loader.processes,
        rank=dist.rank(),
        world_size=dist.size(),
        pin_memory=context.device.type == "cuda",
    )


def newest_checkpoint(config: RunConfig) -> str | None:
    """Where the run would go on from. ValueError if `config.resume` does not allow that."""
    directory = join(config.directory, "checkpoints")
    path = latest(directory)
    if path is None and config.resume == "must":
        raise ValueError(
            f"resume is 'must', but {directory} holds no whole checkpoint; check `storage` and "
            "`name`, or start with resume auto"
        )
    if path is not None and config.resume == "never":
        raise ValueError(
            f"resume is 'never', but the run has the checkpoint {path}; give the run another name, "
            "delete it, or go on from it with resume auto"
        )
    return path


def resume(
    config: RunConfig, engine: Engine, method: Method, label_space: LabelSpace
) -> tuple[int, str | None]:
    """Go on from the newest whole checkpoint: the steps done and its path. Collective."""
    path = on_rank_0(lambda: newest_checkpoint(config))
    if path is None:
        return 0, None
    return load(Checkpoint(path), engine, method.state(), config, label_space), path


class Recorder:
    """Figures on their way out: history file and tracker (rank 0), launcher (all ranks).

    last: the newest figure of each name. evaluated: the steps with figures of an evaluation.
    """

    def __init__(
        self, config: RunConfig, context: Context, tracker: Tracker, first_step: int
    ) -> None:
        self._context, self._tracker = context, tracker
        self._history = History(join(config.directory, "metrics.jsonl"), first_step)
        self.last: dict[str, float] = {}
        self.evaluated: set[int] = set()
        for line in on_rank_0(self._history.read):
            self._keep(int(line.pop("step")), line)
        if dist.rank() == 0:
            tracker.log_params(flatten(config))
            tracker.log_text("config.json", to_json(config))

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Collective."""
        self._keep(step, figures)
        if dist.rank() == 0:
            self._history.append(step, figures)
            self._tracker.log_metrics(figures, step)
        self._context.report(figures)

    def _keep(self, step: int, figures: dict[str, float]) -> None:
        self.last |= figures
        if any(name.startswith(EVALUATION) for name in figures):
            self.evaluated.add(step)


def timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each item with the seconds it was waited for."""
    iterator = iter(items)
    while True:
        started = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - started
