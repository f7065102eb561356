"""What every method owes the system. A method's tests inherit it:

class TestContract(MethodContract):
    method = LarvSegConfig(capacity=3, top_k=4, warm_up=1)
    losses = {"masks": {"seg"}, "weak": {"cls", "aux"}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from memory.digest import digest_of
from no_host_sync import no_host_sync, pretended_device
from train.shards import SIZE, larvseg_config, write_squares
from train.test_loop import Here, assert_same_checkpoints, run_until_killed
from train.test_loop import losses as losses_of

from memseg_dist.assemble import build_label_space, build_method
from memseg_dist.batch import Batch, Clock, Supervision
from memseg_dist.config import EngineConfig, OptimizerConfig, RunConfig, from_json, to_json
from memseg_dist.data.loader import Source, TrainLoader
from memseg_dist.memory.rows import ShardedRows
from memseg_dist.methods.method import PER_CLASS, Method, MethodConfig
from memseg_dist.train import loop
from memseg_dist.train.checkpoint import Checkpoint
from memseg_dist.train.engine import TorchEngine
from memseg_dist.train.load_model import load_model
from memseg_dist.train.loop import train_step
from memseg_dist.train.meters import Meter
from memseg_dist.train.optim import build_optimizer
from memseg_dist.train.platform import Tracker

ZERO = torch.zeros(())
SOURCES: dict[str, tuple[str, Supervision]] = {
    "masks": ("masks", "masks"),
    "weak": ("weak", "labels"),
    "unlabelled": ("masks", "none"),
}
"""Folder and supervision of the sources that a method may be trained on."""


def run(config_json: str, stop_at: int | None = None) -> dict[str, Any]:
    """Train here; what another run must equal."""
    methods: list[Method] = []

    def watched(method: Method, config: RunConfig, device: torch.device) -> TorchEngine:
        methods.append(method)
        return TorchEngine(method, config, device)

    result = loop.train(from_json(config_json), Here(stop_at), Tracker(), watched)
    weights = {name: tensor.clone() for name, tensor in methods[0].state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in beside_weights(methods[0]).items()}
    return result | {"weights": weights | averages, "digests": digests(methods[0])}


def assert_same_run(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Of two results of `run`: weights and memories, bit by bit."""
    differing = [k for k, t in wanted["weights"].items() if not torch.equal(found["weights"][k], t)]
    assert not differing and found["digests"] == wanted["digests"]


def banks(method: Method) -> dict[str, ShardedRows]:
    return {name: m for name, m in method.state().items() if isinstance(m, ShardedRows)}


def digests(method: Method) -> dict[str, str]:
    return {name: digest_of(bank, values=True) for name, bank in banks(method).items()}


def beside_weights(method: Method) -> dict[str, torch.Tensor]:
    """Tensors of the state that every rank holds alike, such as a teacher's."""
    return {
        f"{name}/{key}": tensor
        for name, part in method.state().items()
        if name not in banks(method)
        for key, tensor in part.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


class StepContract:
    """method: its settings at the size of images of 32 pixels, epochs of 2 to 4 steps and 6 steps.

    losses: per source that it trains on - "masks" with masks of two classes, "weak" with labels of
    four, "unlabelled" - the names of its losses. teach_classes: the sources whose classes it can
    be scored on.
    """

    method: MethodConfig
    losses: Mapping[str, set[str]]
    teach_classes: ClassVar[set[str]] = {"masks", "weak"}
    changes: ClassVar[dict[str, Any]] = {}
    """Of the run's config."""
    run: Callable[..., dict[str, Any]] = staticmethod(run)
    """Of a module that the workers can import, and that registers the method."""

    def config(self, data: Path, storage: Path, **changes: Any) -> RunConfig:
        """Five slots, which 2 and 3 workers share unevenly."""
        base = larvseg_config(data, storage)
        slots = [5] if len(self.losses) == 1 else [2, 3]
        sources = tuple(
            Source(name, str(data / SOURCES[name][0]), SOURCES[name][1], slots=count,
                   augment=base.sources[0].augment)
            for name, count in zip(self.losses, slots, strict=True)
        )  # fmt: skip
        assert base.validation is not None
        unknown = () if {"weak"} & {*self.losses} & self.teach_classes else ("n2", "n3")
        defaults = {
            "sources": sources,
            "method": self.method,
            "validation": dataclasses.replace(base.validation, base=(), novel=(), exclude=unknown),
            "engine": EngineConfig("torch"),
        }
        return dataclasses.replace(base, **(defaults | self.changes | changes))

    def build(self, data: Path, storage: Path, **changes: Any) -> tuple[Method, RunConfig]:
        config = self.config(data, storage, **changes)
        return build_method(config, build_label_space(config)), config

    def slots(self, config: RunConfig, step: int) -> list[tuple[Batch, Clock]]:
        loader = TrainLoader(
            config.sources,
            build_label_space(config),
            seed=config.seed,
            cache_dir=config.cache_directory,
        )
        *_, slots = loader.steps(step, step + 1)
        return [(b.to("cpu"), dataclasses.replace(c, num_steps=config.steps)) for b, c in slots]

    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory) -> Path:
        root = tmp_path_factory.mktemp("squares")
        write_squares(root / "masks", 20, 2, with_masks=True)
        write_squares(root / "weak", 20, 4, with_masks=False)
        write_squares(root / "val", 5, 4, with_masks=True)
        return root

    # ---------------------------------------------------------------- one slot

    def test_its_settings_are_json_and_its_kind_finds_them(self, data, tmp_path):
        config = self.config(data, tmp_path)
        assert from_json(to_json(config)) == config

    def test_losses_are_finite_named_and_trainable(self, data, tmp_path):
        method, config = self.build(data, tmp_path)
        method.train()
        slots = self.slots(config, config.steps - 1)
        method.before_step(slots, dataclasses.replace(slots[0][1], slot=0))
        seen: dict[str, set[str]] = {}
        for batch, clock in slots:
            losses = method(batch, clock)
            for name, loss in losses.items():
                assert loss.shape == () and torch.isfinite(loss), name
            sum(losses.values()).backward()
            names = seen.setdefault(batch.source, set(losses))
            assert names == set(losses)  # in every slot, so that their shares add up to the loss
        assert seen == self.losses
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        assert any(gradient.abs().max() > 0 for gradient in gradients)

    def test_the_backbones_learning_rate_reaches_the_backbone(self, data, tmp_path):
        method, _ = self.build(data, tmp_path)
        scaled = OptimizerConfig(lr=1.0, backbone_lr_scale=0.1)
        rates = {
            id(parameter): group["lr_scale"]
            for group in build_optimizer(method, scaled).param_groups
            for parameter in group["params"]
        }
        backbone = [p for m in method.parameter_groups()["backbone"] for p in m.parameters()]
        assert {rates[id(p)] for p in backbone if p.requires_grad} == {0.1}
        assert set(rates.values()) > {0.1}

    def test_a_step_never_waits_for_the_device(self, data, tmp_path):
        """`train_step` as the loop calls it, on a pretended accelerator."""
        config = self.config(data, tmp_path)
        first = config.steps - 3  # where every loss is on and no clustering is due
        with pretended_device() as device:
            method = build_method(config, build_label_space(config), device)
            method.train()
            engine, meter = TorchEngine(method, config, device), Meter()
            for step in (first, first + 1):  # in the first, constants are made
                slots = [(batch.to(device), clock) for batch, clock in self.slots(config, step)]
                whole = dataclasses.replace(slots[0][1], slot=0)
                with no_host_sync() if step > first else nullcontext():
                    train_step(method, engine, slots, 0.01, whole, meter)
            assert all(bank.is_set.any() for bank in banks(method).values())

    def test_smoke_settings_train(self, data, tmp_path):
        config = self.config(data, tmp_path, method=self.method.smoke(), steps=4)
        assert run(to_json(config))["step"] == 4

    def test_looking_leaves_memories_alone(self, data, tmp_path):
        method, config = self.build(data, tmp_path)
        before = digests(method)
        averages = {name: tensor.clone() for name, tensor in beside_weights(method).items()}
        ((batch, clock), *_) = self.slots(config, 0)
        method.eval()
        method.predict(batch.images, torch.arange(2))
        method.maps(batch.images, [0] * len(batch.images))
        method.train()
        method(batch, dataclasses.replace(clock, idle=True))
        method.after_step(clock)
        assert digests(method) == before
        for name, tensor in beside_weights(method).items():
            assert torch.equal(tensor, averages[name]), name

    def test_heads_stay_in_fp32_whoever_asks(self, data, tmp_path):
        """Only the backbone of a bf16 run computes in bf16, in training, validation and use."""
        whole, _ = self.build(data, tmp_path)
        half, config = self.build(data, tmp_path, engine=EngineConfig("torch", precision="bf16"))
        ((batch, clock), *_) = self.slots(config, 0)
        for method in (whole.eval(), half.eval()):
            for ask in (
                lambda m: m.predict(batch.images, torch.arange(2)).dense(),
                lambda m: m.embed(batch.images),
                lambda m: sum(map(torch.sum, m.maps(batch.images, [0, 1]).values()), ZERO),
                lambda m: sum(m(batch, dataclasses.replace(clock, idle=True)).values()),
            ):
                torch.manual_seed(0)
                alone = ask(method)
                torch.manual_seed(0)
                with torch.autocast("cpu", torch.bfloat16):
                    inside = ask(method)
                assert alone.dtype == torch.float32 and torch.equal(inside, alone)
        outputs = [m.predict(batch.images, torch.arange(2)).dense() for m in (whole, half)]
        assert not torch.equal(*outputs), "the backbone of the bf16 run did not compute in bf16"


class MethodContract(StepContract):
    """The whole of it: runs, too, which take longer. A method's further settings, which share their
    runs' machinery, inherit the contract of a step.
    """

    @pytest.fixture(scope="class")
    def whole(self, data, tmp_path_factory, process_pool):
        """The uninterrupted run of one worker."""
        config = self.config(data, tmp_path_factory.mktemp("whole"))
        (result,) = process_pool(1).run(type(self).run, to_json(config))
        return config, result

    @pytest.mark.parametrize("workers", [2, 3])
    def test_the_same_run_on_any_number_of_workers(self, whole, tmp_path, process_pool, workers):
        """Bit by bit, also with idle slots."""
        config, wanted = whole
        other = dataclasses.replace(config, storage=str(tmp_path))
        for found in process_pool(workers).run(type(self).run, to_json(other)):
            assert_same_run(found, wanted)
        assert losses_of(other) == losses_of(config)

    def test_stopped_and_resumed_it_is_the_same_run(self, whole, tmp_path, process_pool):
        config, wanted = whole
        bitwise = dataclasses.replace(config, storage=str(tmp_path / "1"))
        assert process_pool(1).run(type(self).run, to_json(bitwise), 3)[0]["status"] == "stopped"
        (found,) = process_pool(1).run(type(self).run, to_json(bitwise))
        assert losses_of(bitwise) == losses_of(config)
        assert_same_run(found, wanted)
        other = dataclasses.replace(config, storage=str(tmp_path / "2"))
        process_pool(3).run(type(self).run, to_json(other), 2)
        found = process_pool(2).run(type(self).run, to_json(other))[0]
        assert losses_of(other) == losses_of(config)
        assert_same_run(found, wanted)

    @pytest.mark.slow
    def test_killed_and_resumed_it_is_the_same_run(self, data, tmp_path):
        """By SIGKILL, under DeepSpeed: losses, weights and memory, bit for bit."""
        whole, killed = (self.config(data, tmp_path / name) for name in ("whole", "killed"))
        run_until_killed(whole, 0)
        run_until_killed(killed, 5, 0)
        assert losses_of(killed) == losses_of(whole)
        assert_same_checkpoints(killed, whole)

    def test_a_checkpoint_predicts_what_the_run_did(self, whole):
        config, _ = whole
        images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
        classes = torch.arange(2)
        predictions = []
        for with_memories in (False, True):
            checkpoint = Checkpoint(f"{config.directory}/checkpoints/step-00000006")
            model = load_model(checkpoint, torch.device("cpu"), with_memories=with_memories)
            model.method.eval()
            with torch.no_grad():
                prediction = model.method.predict(images, classes)
            assert prediction.num_classes == 2
            dense = prediction.dense()
            assert dense.shape[:2] == (2, 2) and dense.dtype == torch.float32
            torch.testing.assert_close(prediction.chunk(1, 2), dense[:, 1:2])
            predictions.append(dense)
            norm = model.method.embed(images).norm(dim=1)
            torch.testing.assert_close(norm, torch.ones_like(norm))
            self._check_figures(model.method, len(model.label_space), model.method.embed(images))
            for picture in model.method.maps(images, [0, 1]).values():
                assert picture.shape[0] == 2 and 0 <= picture.min() <= picture.max() <= 1
        assert torch.equal(*predictions)

    @staticmethod
    def _check_figures(method: Method, num_classes: int, embedded: torch.Tensor) -> None:
        """Of the hooks that an evaluation asks for figures."""
        for name, values in method.charts().items():
            assert values.ndim == 1 and values.device.type == "cpu", name
            assert not name.endswith(PER_CLASS) or len(values) == num_classes, name
        found = method.class_vectors()
        if found is not None:
            class_ids, vectors = found
            assert class_ids.dtype == torch.int64 and class_ids.shape == vectors.shape[:1]
            assert vectors.is_floating_point() and vectors.shape[1] == embedded.shape[1]
            assert class_ids.device.type == vectors.device.type == "cpu"
            assert (class_ids.diff() >= 0).all() and torch.isfinite(vectors).all()
            assert not len(class_ids) or 0 <= class_ids[0] <= class_ids[-1] < num_classes
