"""A run as one tree of frozen dataclasses: built by a job, shown by --help, kept in a checkpoint.

Every class checks its own values when it is built; `RunConfig` checks what its parts say together.
`to_json` and `from_json` are exact inverses, and an unknown key is an error that names its
neighbours. Docstrings below a field are its help text.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

import torch
import tyro

from memseg_dist import jsonable
from memseg_dist.checks import (
    NotNegative,
    NotNegativeInt,
    Positive,
    PositiveInt,
    check_leaves,
    check_numbers,
    check_pairs,
    check_scales,
    check_view,
    require,
)
from memseg_dist.data.files import absolute
from memseg_dist.data.loader import Source
from memseg_dist.data.loader_process import TIMEOUT_S
from memseg_dist.data.splits import is_path
from memseg_dist.methods import kinds  # noqa: F401 (fills MethodConfig.kinds)
from memseg_dist.methods.method import MethodConfig
from memseg_dist.nn.backbone import BackboneConfig


def _shortened(default: str) -> str:
    return default if len(default) < 200 else "(default: a long list, set by the job)"


Uids: TypeAlias = Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint=_shortened)]


@dataclass(frozen=True)
class ValidationConfig:
    """What to evaluate on, and how."""

    path: str
    """Directory or URL of the validation shards; every class of its vocabulary competes."""
    name: str = "validation"
    """Name of its vocabulary in the label space."""
    mode: Literal["whole", "slide"] = "slide"
    """One forward pass per image, or windows whose logits are averaged."""
    resize: tuple[int, int] = (2048, 512)
    """Longest and shortest side that an image is fitted to."""
    keep_ratio: bool = True
    """Keep its aspect ratio; else its sides become exactly these."""
    window: int | tuple[int, int] = 512
    """Side of a sliding window in pixels, or its height and width."""
    stride: int | tuple[int, int] = 512
    """Step between windows in pixels, or the steps down and across."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes of the image to look at, relative to the fitted one; their results are averaged."""
    flip: bool = False
    """Look at the mirror image of each size as well."""
    swap: tuple[tuple[str, str], ...] = ()
    """Pairs of class uids that a mirror turns into each other, as a left and a right arm."""
    average: Literal["logits", "probabilities"] = "logits"
    """What is averaged over the scales and mirror images."""
    base: Uids = ()
    """Class uids that had masks in training. Empty together with `novel`: only All is reported."""
    novel: Uids = ()
    """Class uids that never had a mask in training."""
    exclude: Uids = ()
    """Class uids that neither compete nor are scored, as a background without a map."""
    max_images: PositiveInt | None = None
    """Evaluate on the first so many images only."""
    num_panels: NotNegativeInt = 4
    """How many images are drawn as image | truth | prediction | maps; 0 leaves out the pixels
    around the class vectors too.
    """

    def __post_init__(self) -> None:
        check_numbers(self, "validation.")
        check_view(self.mode, self.resize, self.window, self.stride, "validation.")
        check_scales(self.scales, "validation.scales")
        check_pairs(self.swap, "validation.swap")
        both = sorted(set(self.base) & set(self.novel))
        require(not both, "validation.novel", both, "uids that are not in validation.base too")


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD or AdamW under a polynomial or a stepwise schedule, by step."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """Stochastic gradient descent with momentum, or Adam with decoupled weight decay."""
    lr: Positive = 1e-3
    """Highest learning rate."""
    momentum: NotNegative = 0.9
    """SGD only."""
    nesterov: bool = False
    """SGD only."""
    weight_decay: NotNegative = 0.0
    """Not applied to biases, norms and other tensors of fewer than two axes, but see
    `decay_norms_and_biases`."""
    decay_norms_and_biases: bool = False
    """Apply the weight decay to every tensor."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only."""
    schedule: Literal["poly", "step"] = "poly"
    """poly: the rate falls to `min_lr` along a polynomial; step: it falls at the `milestones`."""
    power: NotNegative = 0.9
    """poly: lr(step) = (lr - min_lr) * (1 - step / steps) ** power + min_lr."""
    min_lr: NotNegative = 1e-5
    """poly only."""
    milestones: tuple[int, ...] = ()
    """step: from each of these steps on the rate is `decay` times what it was."""
    decay: Positive = 0.1
    """step: factor on the rate at a milestone."""
    warmup_steps: NotNegativeInt = 0
    """The learning rate rises linearly over so many steps."""
    clip_norm: Positive | None = None
    """Gradients are scaled down to this global L2 norm."""
    backbone_lr_scale: NotNegative = 1.0
    """Learning rate of the parameters under `backbone.`, relative to the others."""
    bias_lr_scale: NotNegative = 1.0
    """Further factor on the learning rate of every `bias` of one axis."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer.")
        if self.schedule == "poly":
            wanted = f"at most lr ({self.lr})"
            require(self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, wanted)
            wanted = "empty unless optimizer.schedule is 'step'"
            require(not self.milestones, "optimizer.milestones", self.milestones, wanted)
        ascend = all(one < next for one, next in zip((0, *self.milestones), self.milestones))
        require(ascend, "optimizer.milestones", self.milestones, "ascending steps above 0")
        has_momentum = self.kind == "sgd" and self.momentum > 0
        wanted = "False unless optimizer.kind is 'sgd' with momentum above 0"
        require(not self.nesterov or has_momentum, "optimizer.nesterov", self.nesterov, wanted)


@dataclass(frozen=True)
class EngineConfig:
    """What computes gradients and holds the optimizer. What is None is decided by the device."""

    kind: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed, or plain torch, which gives the same result."""
    zero_stage: int = 0
    """DeepSpeed: 0 replicates, 1 splits the optimizer's state over the workers, 2 gradients too."""
    precision: Literal["fp32", "bf16"] | None = None
    """bf16: the backbone runs under autocast; heads, losses, gradients and memories stay fp32. By
    default bf16 on CUDA and fp32 elsewhere."""
    tf32: bool | None = None
    """TF32 for products and convolutions in fp32, on CUDA alone, where it is the default; False
    keeps all 24 bits of them."""
    activation_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass instead of keeping them."""
    channels_last: bool | None = None
    """Convolutional backbones compute on [B, H, W, C] in memory; by default on CUDA. It is faster
    on most CPUs too, and moves results by rounding."""
    cudnn_benchmark: bool | None = None
    """Training tries cuDNN's algorithms for every size of crop and takes the fastest, which need
    not be the same in the next run; by default on CUDA."""
    fused_optimizer: bool | None = None
    """Update all parameters in one kernel; by default on CUDA. It moves results by rounding."""
    compile: bool = False
    """Compile the backbone with torch.compile: the first step takes minutes, and each size of crop
    and kind of pass again."""
    ordered_sums: bool | None = None
    """Add up the slots' gradients in the order of the slots, which makes a run on CPU the same bit
    by bit on any number of workers. Without a value: on CPU only, since CUDA's own sums have no
    order. It costs an exchange of gradients per slot instead of one per step. ZeRO 1 and 2 reduce
    in an order of their own."""

    def on(self, device: torch.device | str) -> EngineConfig:
        """The same with what is None decided for `device`: all that is fast on CUDA, what is
        exact elsewhere.
        """
        is_cuda = torch.device(device).type == "cuda"
        fast: dict[str, Any] = dict.fromkeys(
            ("tf32", "channels_last", "cudnn_benchmark", "fused_optimizer"), is_cuda
        )
        fast |= {"precision": "bf16" if is_cuda else "fp32", "ordered_sums": not is_cuda}
        undecided = {name: value for name, value in fast.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **undecided)

    def __post_init__(self) -> None:
        if self.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage 3 is not supported: it leaves every worker with a part of each "
                "weight, while the class statistics, evaluation and world-size-free checkpoints "
                "read whole weights; use 2, which splits gradients and optimizer state"
            )
        require(self.zero_stage in (0, 1, 2), "engine.zero_stage", self.zero_stage, "0, 1 or 2")
        wanted = "0 with engine.kind 'torch', which splits nothing"
        is_split = self.kind == "deepspeed" or self.zero_stage == 0
        require(is_split, "engine.zero_stage", self.zero_stage, wanted)


@dataclass(frozen=True)
class LaunchConfig:
    """Where the workers run."""

    launcher: Literal["ray", "local"] = "ray"
    """ray: a Ray cluster, or one started here; local: plain processes on this machine."""
    workers: int | tuple[int, int] = 1
    """How many workers, or (min, max): as many as an elastic cluster gives, or as this machine has
    GPUs or else cores. At most as many as there are slots."""
    cpus_per_worker: PositiveInt = 1
    """Cores that Ray reserves for each worker."""
    use_gpu: bool | None = None
    """One GPU per worker; by default if there is a GPU."""
    address: str | None = None
    """Address of a running Ray cluster; by default the one that the environment names, or none."""
    max_failures: int = 3
    """How often a failed group of workers is restarted from the last checkpoint; -1: always."""
    timeout_s: Positive = 900.0
    """How long a worker waits for the others in a collective before it fails and names those that
    did not come, in seconds. Above loader.timeout_s, so that a read that hangs is named as such."""

    def __post_init__(self) -> None:
        low, high = self.workers_range
        require(1 <= low <= high, "launch.workers", self.workers, "1 or more, as n or (min, max)")
        check_numbers(self, "launch.")
        require(self.max_failures >= -1, "launch.max_failures", self.max_failures, "-1 or more")

    @property
    def workers_range(self) -> tuple[int, int]:
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers


@dataclass(frozen=True)
class TrackingConfig:
    """Where figures and pictures go. A tracking failure never stops training."""

    kind: Literal["mlflow", "console", "none"] = "mlflow"
    """Standard output and metrics.jsonl have the figures in any case. console: pictures and tables
    go to the run's directory; mlflow: to MLflow too; none: to nowhere."""
    uri: str | None = None
    """MLflow tracking URI; by default sqlite:///STORAGE/mlflow.db."""
    experiment: str = "memseg-dist"
    """MLflow experiment that the run belongs to."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use of the machine as well."""


@dataclass(frozen=True)
class LoaderConfig:
    """How samples are read; changes nothing in what is read."""

    processes: NotNegativeInt = 2
    """Loader processes per worker; 0 reads in the worker itself. Ray keeps a CPU for each."""
    prefetch: PositiveInt = 2
    """Micro-batches that each loader process keeps ready."""
    cache_dir: str | None = None
    """Directory of the shard and index cache; by default STORAGE/cache."""
    cache_bytes: PositiveInt = 32 * 2**30
    """The cache forgets the least recently used shards above this size."""
    timeout_s: Positive = TIMEOUT_S
    """How long a worker waits for a batch before it fails and names the shard that hangs, in
    seconds; with `processes` 0 it waits for ever."""

    def __post_init__(self) -> None:
        check_numbers(self, "loader.")


@dataclass(frozen=True)
class Intervals:
    """How often something happens, in steps. What has an interval also happens after the last."""

    log: PositiveInt = 50
    """How often losses and speed are reported."""
    evaluate: PositiveInt = 5000
    """How often the validation set is scored."""
    checkpoint: PositiveInt = 1000
    """How often all of the run is saved."""
    keep_checkpoints: PositiveInt = 3
    """So many of the newest checkpoints are kept."""
    poll: PositiveInt = 10
    """How often the workers ask whether to stop (preemption, SIGTERM)."""

    def __post_init__(self) -> None:
        check_numbers(self, "every.")


@dataclass(frozen=True)
class Relabelling:
    """Renames classes of one source before the vocabularies are joined."""

    source: str
    """Name of the source, or of the validation set."""
    classes: Annotated[str, tyro.conf.arg(help_behavior_hint=_shortened)]
    """JSON {local uid: {"uid": ..., "name": ..., "synonyms": [...]}}."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. Its flags are in the order of the fields: what is changed often first."""

    name: str
    """Files go to STORAGE/NAME; starting the same name again resumes it."""
    storage: str
    """Directory, or fsspec URL (s3://bucket/runs), that every worker can reach."""
    steps: PositiveInt = 320_000
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Of the fresh weights, the order of the samples and all that is drawn while training."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: from the newest whole checkpoint, if any; never: refuse a run directory that has one;
    must: refuse a run directory that has none."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    method: MethodConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    every: Intervals = field(default_factory=Intervals)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    validation: ValidationConfig | None = None
    sources: tuple[Source, ...]
    """Data sources with their slots; a step is one micro-batch of every slot."""
    relabel: tuple[Relabelling, ...] = ()
    """Classes that are renamed before the vocabularies are joined."""

    def __post_init__(self) -> None:
        check_leaves(self)
        check_numbers(self)
        is_name = self.name.strip(".") and not set(self.name) & {"/", "\\", "\0", "\n"}
        require(is_name, "name", self.name, "a folder's name without '/'")
        require(bool(self.sources), "sources", self.sources, "at least one source")
        names = [source.name for source in self.sources]
        require(self.num_slots > 0, "sources", names, "at least one with a slot")
        require(len(set(names)) == len(names), "sources", names, "sources of different names")
        scored = [self.validation.name] if self.validation else []
        unknown = sorted({relabel.source for relabel in self.relabel} - {*names, *scored})
        require(not unknown, "relabel", unknown, f"sources of this run: {names + scored}")
        workers = self.launch.workers_range[1]
        if workers > self.num_slots:
            raise ValueError(
                f"launch.workers {workers} is more than the {self.num_slots} slots of the sources "
                f"{names}: a worker without a slot would have nothing to do. Use at most "
                f"{self.num_slots} workers, or give a source more slots"
            )

    @property
    def active_sources(self) -> tuple[Source, ...]:
        """Those with slots. Nothing but the label space knows the others."""
        return tuple(source for source in self.sources if source.slots)

    @property
    def num_slots(self) -> int:
        return sum(source.slots for source in self.sources)

    @property
    def directory(self) -> str:
        """Directory or URL that holds everything this run writes."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def cache_directory(self) -> str:
        if self.loader.cache_dir is None and "://" in self.storage:
            raise ValueError(
                f"storage {self.storage} is a URL, which cannot hold the shard cache; "
                "set loader.cache_dir to a local directory"
            )
        return self.loader.cache_dir or f"{self.storage.rstrip('/')}/cache"


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """`config` with every relative path made absolute: workers have another working directory."""
    validation, cache_dir = config.validation, config.loader.cache_dir
    weights, replace = config.backbone.pretrained, dataclasses.replace
    if weights not in ("", "hub"):
        weights = absolute(weights)
    return replace(
        config,
        storage=absolute(config.storage),
        sources=tuple(
            replace(
                source,
                path=absolute(source.path),
                saliency=source.saliency and absolute(source.saliency),
                split=_absolute_split(source.split),
                pseudo_masks=source.pseudo_masks and absolute(source.pseudo_masks),
            )
            for source in config.sources
        ),
        backbone=replace(config.backbone, pretrained=weights),
        validation=validation and replace(validation, path=absolute(validation.path)),
        loader=replace(config.loader, cache_dir=cache_dir and absolute(cache_dir)),
    )


def _absolute_split(split: str | None) -> str | None:
    return absolute(split) if split is not None and is_path(split) else split


def to_json(config: RunConfig) -> str:
    return json.dumps(jsonable.encode(config), indent=2) + "\n"


def from_json(text: str, where: str = "config") -> RunConfig:
    """The inverse of `to_json`. ValueError naming the file `where`, the dotted key and more."""
    return jsonable.decode(RunConfig, jsonable.parse(text, where), where)
