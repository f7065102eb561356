"""DeepSpeed as an engine: ZeRO 0, 1 and 2 behind the same verbs as `train.engine.TorchEngine`.

Where DeepSpeed's own training step would not give (1 / S) * sum over slots, it is told otherwise:

- Gradients are summed, not averaged, over ranks (`gradient_allreduce_op`), and not divided by the
  accumulation steps (`scale_wrt_gas=False`); the slot's weight does both.
- Without ZeRO, adding up and clipping are ours: the order of DeepSpeed's sum depends on the number
  of workers; its clipping gives no norm and fails on scalar parameters.
- With ZeRO, nothing is reduced before `step`. DeepSpeed reduces a ZeRO-2 gradient in the order in
  which backward produces it; workers whose slots belong to different sources use different
  parameters in a different order, and would add up unlike gradients. So every backward of a step
  accumulates locally, parameters that were not used get zeros, and one pass in a fixed order
  reduces them all. (ZeRO 2 then frees gradients after the reduction, not during the backward pass.)
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from memseg_dist import dist
from memseg_dist.batch import Batch, Clock
from memseg_dist.config import RunConfig
from memseg_dist.methods.method import Method
from memseg_dist.platforms.process import join_group_of_one
from memseg_dist.train import optim
from memseg_dist.train.engine import (
    EngineState,
    host_weights,
    load_weights,
    loss_weight,
    slot_forward,
)
from memseg_dist.train.gradients import GradientSum

BUCKET_ELEMENTS = 50_000_000


def import_deepspeed(device: torch.device) -> Any:
    """The module, set up for `device` by the environment that it reads when imported."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    else:
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of SGD, which the tests cover
    if device.type == "cpu":
        # its shared-memory reduction compiles for half a minute and assumes a single node
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(config: RunConfig, num_parameters: int) -> dict[str, Any]:
    """What DeepSpeed is started with. A micro-batch counts as 1: sources may differ in size."""
    num_micro, stage = -(-config.num_slots // dist.size()), config.engine.zero_stage
    bucket = min(BUCKET_ELEMENTS, -(-num_parameters // 1024) * 1024)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro,
        "train_batch_size": num_micro * dist.size(),
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0 if stage == 0 else config.optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": 2**60,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every slot
    }


class DeepSpeedEngine:
    def __init__(self, method: Method, config: RunConfig, device: torch.device) -> None:
        deepspeed = import_deepspeed(device)
        join_group_of_one(device.type == "cuda")  # DeepSpeed wants a group, even of one
        self.method, self.config, self._device = method, config, device
        self._named = optim.trainable(method)
        num_parameters = sum(parameter.numel() for parameter in self._named.values())
        # DeepSpeed sends parameters as bytes when it starts, and cannot view a scalar as bytes;
        # ZeRO gives them the shape they started with after every step
        self._scalars = [parameter for parameter in method.parameters() if parameter.ndim == 0]
        self._reshape_scalars((1,))
        settings = config.engine.on(device)
        fused, in_order = bool(settings.fused_optimizer), bool(settings.ordered_sums)
        self._engine, *_ = deepspeed.initialize(
            model=method,
            optimizer=optim.build_optimizer(method, config.optimizer, fused=fused),
            config=deepspeed_config(config, num_parameters),
        )
        self._reshape_scalars(())
        if getattr(self._engine, "gradient_average", True):
            raise ValueError(
                f"deepspeed {deepspeed.__version__} does not know gradient_allreduce_op and would "
                "average gradients over workers; install deepspeed>=0.19.8"
            )
        self._engine.set_gradient_accumulation_boundary(True)
        self._is_sharded = config.engine.zero_stage > 0
        if self._is_sharded:
            zero = self._engine.optimizer
            self._optimizer: torch.optim.Optimizer = zero.optimizer
            held = list(zero.single_partition_of_fp32_groups)
        else:
            self._optimizer = self._engine.optimizer
            held = [*self._named.values()]
        optim.initialise_state(self._optimizer, config.optimizer, held)
        if self._is_sharded:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        self._gradients = GradientSum([*self._named.values()], in_order=in_order)
        self._local_backwards = ExitStack()
        self._is_accumulating = False

    def __call__(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        with slot_forward(self.method, clock):
            return self._engine(batch, clock)

    def backward(self, loss: Tensor, clock: Clock) -> None:
        if not self._is_accumulating:
            engine = self._engine
            local = engine.coalesce_grad_reduction if self._is_sharded else engine.no_sync
            self._local_backwards.enter_context(local())
            self._is_accumulating = True
        self._engine.backward(loss * loss_weight(clock), scale_wrt_gas=False)
        if not self._is_sharded:
            self._gradients.add_slot()

    def step(self, lr: float) -> Tensor:
        if not self._is_sharded:
            self._gradients.finish()
        optim.fill_missing_gradients(self.method)
        self._local_backwards.close()  # reduces, in ZeRO 1 and 2
        self._is_accumulating = False
        optim.set_learning_rate(self._optimizer, lr)
        if self._is_sharded:
            self._engine.step()
            self._reshape_scalars(())
            norm = self._engine.get_global_grad_norm()
            return torch.as_tensor(norm, device=self._device)  # one that is not finite is a number
        clip_norm = self.config.optimizer.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._named.values(), clip_norm)
        self._engine.step()
        return norm

    def _reshape_scalars(self, shape: tuple[int, ...]) -> None:
        for parameter in self._scalars:
            parameter.data = parameter.data.reshape(shape)

    def state(self) -> EngineState:
        weights = host_weights(self.method)  # fp32 and whole on every rank in ZeRO 0 to 2
        if not self._is_sharded:
            return EngineState(weights, optim.whole_state(self._optimizer, self._named))
        from deepspeed.utils import safe_get_full_optimizer_state

        saved = {}
        for name, parameter in self._named.items():
            for key in optim.state_keys(self.config.optimizer):
                whole = safe_get_full_optimizer_state(parameter, key)  # collective
                if dist.rank() == 0:
                    saved[f"{key}/{name}"] = whole.cpu()
        if dist.rank() == 0:
            saved |= optim.update_count(self._optimizer)
        return EngineState(weights, saved)

    def load(self, state: EngineState) -> None:
        load_weights(self.method, state.weights)
        saved = state.optimizer
        if not self._is_sharded:
            optim.load_whole_state(self._optimizer, self._named, saved)
            return
        # every rank keeps its own part of the weights and of the optimizer's state
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self._named.items():
            safe_set_full_fp32_param(parameter, parameter.detach())
            for key in optim.state_keys(self.config.optimizer):
                tensor = optim.read_state(saved, key, name, parameter.shape)
                safe_set_full_optimizer_state(parameter, tensor.to(parameter.device), key)
        optim.load_update_count(self._optimizer, saved)
