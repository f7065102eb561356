"""The training loop, which knows no method, no platform and no cluster.

data -> method.before_step -> engine(slot) for this rank's slots -> engine.step
     -> method.after_step
     -> every so often: log, checkpoint, evaluate, ask whether to stop
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from memseg_dist import dist
from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import Batch, Clock
from memseg_dist.config import RunConfig
from memseg_dist.data.files import join
from memseg_dist.data.loader import TrainLoader
from memseg_dist.data.vocabulary import LabelSpace
from memseg_dist.methods.method import Method
from memseg_dist.nn.batchnorm import commit_statistics
from memseg_dist.train.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    discard,
    load,
    whole_checkpoints,
)
from memseg_dist.train.engine import Engine, EngineFactory
from memseg_dist.train.meters import Meter, Recorder, log_config
from memseg_dist.train.optim import learning_rate
from memseg_dist.train.platform import Context, Tracker
from memseg_dist.train.saver import Saver
from memseg_dist.train.storage import make_writable, on_rank_0
from memseg_dist.train.validate import Draw, Validator


def train(
    config: RunConfig,
    context: Context,
    tracker: Tracker,
    engine_factory: EngineFactory,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Run `config` to its last step, or until the context wants to stop. Collective.

    draw: makes the pictures of an evaluation; None: there are none.
    Returns {"status": "finished" or "stopped", "step", "checkpoint", and the last figures}.
    ValueError, on every rank, for what the user can correct.
    """
    try:
        with dist.naming_absent_ranks():  # before the tracker, which may take a while to finish
            result = _train(config, context, tracker, engine_factory, draw)
    except BaseException as error:
        name = time.strftime("errors/%Y-%m-%dT%H-%M-%S.txt", time.gmtime())
        tracker.log_text(name, "".join(traceback.format_exception(error)))
        tracker.finish("failed")
        raise
    tracker.finish(result["status"])
    return result


def _train(
    config: RunConfig,
    context: Context,
    tracker: Tracker,
    engine_factory: EngineFactory,
    draw: Draw | None,
) -> dict[str, Any]:
    on_rank_0(lambda: make_writable(config.directory))
    if dist.rank() == 0:
        log_config(config, tracker)
    label_space = build_label_space(config)
    method = build_method(config, label_space, context.device)
    engine = engine_factory(method, config, context.device)
    method.train()
    device = context.device
    validate = Validator(config, label_space, device, draw) if config.validation else None
    loader = build_loader(config, label_space, context)
    data = on_rank_0(loader.fingerprints)
    done, checkpoint = resume(config, engine, method, label_space, data)
    record = Recorder(config, context, tracker, done)
    meter, every = Meter(), config.every
    folder = join(config.directory, "checkpoints")
    saver = Saver(folder, config, label_space, data, every.keep_checkpoints)
    is_stopping = False

    def settle(wait: bool) -> None:
        nonlocal checkpoint
        if (path := saver.settle(wait)) is not None:
            checkpoint = path
            context.report(record.last, checkpoint)

    def evaluate_if_due() -> None:
        is_due = done == config.steps or (done > 0 and done % every.evaluate == 0)
        if validate is not None and is_due and done not in record.evaluated:
            settle(wait=True)  # an evaluation is long, and may be killed too
            record(done, validate(method, tracker, done))

    evaluate_if_due()  # a run that was stopped between its checkpoint and its evaluation
    asked = time.perf_counter()
    for slots in loader.steps(done, config.steps):
        waited = time.perf_counter() - asked
        lr = learning_rate(config.optimizer, done, config.steps)
        step_clock = Clock(
            done, num_slots=config.num_slots, seed=config.seed, num_steps=config.steps
        )
        slots = [(batch.to(device), clock) for batch, clock in slots]
        grad_norm = train_step(method, engine, slots, lr, step_clock, meter)
        meter.add_step(done, grad_norm, waited)
        done += 1

        is_last = done == config.steps
        is_stopping = not is_last and done % every.poll == 0 and context.should_stop()
        saves = is_last or is_stopping or done % every.checkpoint == 0
        if saves or done % every.log == 0:
            # the line first: a run that goes on from the checkpoint does not make it again
            record(done, {"lr": lr, **meter.read(), **method.summary(step_clock)})
        if saves:
            settle(wait=True)  # one at a time
            saver.start(done, engine, method.state())
        settle(wait=is_last or is_stopping)
        if is_stopping:
            break
        evaluate_if_due()
        if saves or done in record.evaluated:
            meter.restart_clock()
        asked = time.perf_counter()

    status = "stopped" if is_stopping else "finished"
    return {**record.last, "status": status, "step": done, "checkpoint": checkpoint}


def train_step(
    method: Method,
    engine: Engine,
    slots: Sequence[tuple[Batch, Clock]],
    lr: float,
    clock: Clock,
    meter: Meter,
) -> Tensor:
    """One optimizer step over this rank's slots: the gradient's norm, []. Collective."""
    method.before_step(slots, clock)
    for batch, slot_clock in slots:
        losses = engine(batch, slot_clock)
        engine.backward(sum(losses.values()), slot_clock)  # type: ignore[arg-type]
        meter.add_slot(batch, slot_clock, losses)
    grad_norm = engine.step(lr)
    commit_statistics(method)
    method.after_step(clock)
    return grad_norm


def build_loader(config: RunConfig, label_space: LabelSpace, context: Context) -> TrainLoader:
    return TrainLoader(
        config.active_sources,
        label_space,
        seed=config.seed,
        cache_dir=config.cache_directory,
        cache_bytes=config.loader.cache_bytes,
        num_processes=config.loader.processes,
        prefetch=config.loader.prefetch,
        timeout_s=config.loader.timeout_s,
        rank=dist.rank(),
        world_size=dist.size(),
        pin_memory=context.device.type == "cuda",
    )


def checkpoints_to_resume(config: RunConfig) -> list[str]:
    """Whole checkpoints to go on from, the newest first. ValueError if `config.resume` does not
    allow what there is.
    """
    directory = join(config.directory, "checkpoints")
    paths = whole_checkpoints(directory)[::-1]
    if not paths and config.resume == "must":
        raise ValueError(
            f"resume is 'must', but {directory} holds no whole checkpoint; check `storage` and "
            "`name`, or start with resume auto"
        )
    if paths and config.resume == "never":
        raise ValueError(
            f"resume is 'never', but the run has the checkpoint {paths[0]}; give the run another "
            "name, delete it, or go on from it with resume auto"
        )
    return paths


def resume(
    config: RunConfig,
    engine: Engine,
    method: Method,
    label_space: LabelSpace,
    data: Mapping[str, str],
) -> tuple[int, str | None]:
    """Go on from the newest checkpoint that is as it was written: the steps done and its path.

    Damaged ones are discarded with a warning once an older one has been loaded; ValueError if there
    is none. Collective.
    """
    damaged: list[str] = []
    for path in on_rank_0(lambda: checkpoints_to_resume(config)):
        try:
            done = load(Checkpoint(path), engine, method.state(), config, label_space, data)
        except DamagedCheckpoint as error:
            damaged.append(path)
            if dist.rank() == 0:
                print(f"WARNING: {error}", flush=True)
            continue
        if damaged:
            on_rank_0(lambda: discard(damaged))
            if dist.rank() == 0:
                print(f"WARNING: the run goes back to {path} and discards {damaged}", flush=True)
        return done, path
    if damaged:
        raise ValueError(
            f"no checkpoint of the run is as it was written ({', '.join(damaged)}); restore one, "
            "or delete them to start from the beginning"
        )
    return 0, None
