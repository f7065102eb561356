"""Configs: exact round trips, strict reading, checks at the boundary."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import tyro
from train.shards import larvseg_config

from memseg_dist.assemble import set_kernels
from memseg_dist.config import (
    EngineConfig,
    LaunchConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
    from_json,
    to_json,
    with_absolute_paths,
)
from memseg_dist.data.augment import AugmentConfig
from memseg_dist.jsonable import flatten
from memseg_dist.methods.classify import ClassifyConfig
from memseg_dist.methods.method import evaluation_mode
from memseg_dist.stages import LabelConfig


@pytest.fixture
def config(tmp_path):
    return larvseg_config(tmp_path, tmp_path / "out")


def changed(config: RunConfig, path: str, value) -> str:
    """The config's JSON with the value at the dotted `path` replaced or added."""
    tree = json.loads(to_json(config))
    *parents, last = path.split(".")
    node = tree
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    return json.dumps(tree)


def test_json_round_trip_is_exact(config):
    elastic = dataclasses.replace(config, launch=LaunchConfig("ray", workers=(1, 4)))
    classify = dataclasses.replace(config, method=ClassifyConfig(), validation=None)
    looking_twice = dataclasses.replace(
        config,
        validation=ValidationConfig("val", scales=(0.5, 1.0), flip=True, swap=(("a", "b"),)),
        sources=tuple(
            dataclasses.replace(source, swap_on_flip=(("a", "b"), ("c", "d")))
            for source in config.sources
        ),
    )
    for each in (config, elastic, classify, looking_twice):
        assert from_json(to_json(each)) == each


@pytest.mark.parametrize(
    "path, near",
    [
        ("optimizer.learning_rate", "'optimizer.learning_rate'; did you mean"),
        ("stepps", "'stepps'; did you mean steps"),
        ("method.warmup", "'method.warmup'; did you mean warm_up"),
        ("sources.1.slot", "'sources.1.slot'; did you mean slots"),
        ("sources.0.augment.crops", "'sources.0.augment.crops'; did you mean crop"),
        ("validation.windows", "'validation.windows'; did you mean window"),
    ],
)
def test_unknown_key_names_file_key_and_neighbours(config, path, near):
    with pytest.raises(ValueError, match=rf"run\.json: unknown key {near}"):
        from_json(changed(config, path, 1), "run.json")


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("steps", "many", r"steps is 'many'; it must be of type int"),
        ("steps", True, r"steps is True; it must be of type int"),
        ("optimizer.lr", 0, r"optimizer.lr is 0.0; it must be above 0"),
        (
            "optimizer.kind",
            "adam",
            r"optimizer.kind is 'adam'; it must be one of \['sgd', 'adamw'\]",
        ),
        (
            "method.kind",
            "unet",
            r"method.kind is 'unet'; it must be one of \['classify', 'larvseg', ",
        ),
        ("optimizer.betas", [0.9], r"optimizer.betas is \[0.9\]; it must be a list of 2"),
        ("launch.workers", [1, 9], r"launch.workers 9 is more than the 5 slots.*at most 5"),
        ("launch.workers", 0, r"launch.workers is 0; it must be 1 or more"),
        ("engine.zero_stage", 3, r"zero_stage 3 is not supported.*use 2"),
        (
            "engine",
            {"kind": "torch", "zero_stage": 2},
            r"zero_stage is 2; .*0 with engine.kind",
        ),
        ("method.warm_up", 4, r"method.warm_up is 4; it must be at most method.capacity \(3\)"),
        ("method.warm_up", 0, r"method.warm_up is 0; it must be above 0"),
        ("method.top_k", 0, r"method.top_k is 0; it must be above 0"),
        ("method.temperature", 0.0, r"method.temperature is 0.0; it must be above 0"),
        ("method.cls_weight", -1.0, r"method.cls_weight is -1.0; it must be 0 or more"),
        (
            "method",
            {"kind": "classify", "label_smoothing": 3.0},
            r"method.label_smoothing is 3.0; it must be from 0 to 1",
        ),
        ("method", {"kind": "rca", "map_gate": 2.0}, r"method.map_gate is 2.0; .*from 0 to 1"),
        ("method", {"kind": "rca", "gate": 1.5}, r"method.gate is 1.5; .*from 0 to 1"),
        ("validation.novel", ["n0"], r"validation.novel is \['n0'\]"),
        ("validation.scales", [], r"validation.scales is \(\); it must be one or more finite"),
        ("validation.scales", [1, -1], r"validation.scales is \(1.0, -1.0\)"),
        ("validation.swap", [["a", "a"]], r"validation.swap is .* pairs of two different classes"),
        ("validation.average", "sum", r"validation.average is 'sum'; it must be one of"),
        ("sources.0.swap_on_flip", [["a", "b"], ["b", "c"]], r"'masks': swap_on_flip is"),
        ("sources.0.augment.rotate", -5, r"rotate -5.0 is an angle"),
        ("every.log", 0, r"every.log is 0; it must be above 0"),
        ("name", "a/b", r"name is 'a/b'; it must be a folder's name without '/'"),
        ("name", "..", r"name is '\.\.'; it must be a folder's name"),
        ("optimizer.lr", float("nan"), r"optimizer.lr is nan; it must be"),
        ("optimizer.clip_norm", float("inf"), r"optimizer.clip_norm is inf"),
        ("optimizer.betas", [0.9, float("inf")], r"optimizer.betas is inf"),
        ("method.cls_weight", float("nan"), r"cls_weight.* nan"),
        ("sources.0.augment.rotate", float("nan"), r"rotate"),
        ("sources", [], r"sources is \(\); it must be at least one source"),
        (
            "relabel",
            [{"source": "x", "classes": "{}"}],
            r"relabel is \['x'\]; it must be sources of",
        ),
    ],
)
def test_values_are_checked_with_key_and_value(config, path, value, message):
    with pytest.raises(ValueError, match=message):
        from_json(changed(config, path, value), "run.json")


SECRETS = {
    "tracking": "https://ann:hunter2@tracking.example/api",
    "storage": "s3://KEY:hunter2@bucket/runs",
    "token": "https://hunter2@tracking.example",
    "query": "postgresql://db.example/mlflow?password=hunter2",
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_url_with_a_secret_is_refused_without_showing_it(config, name):
    key = "storage" if name == "storage" else "tracking.uri"
    with pytest.raises(ValueError, match=rf"{key} \w+://\w+(\.example)?.*environment") as found:
        from_json(changed(config, key, SECRETS[name]), "run.json")
    assert "hunter2" not in str(found.value)
    with pytest.raises(ValueError, match="comes with a user") as found:
        LabelConfig("runs/a", data="https://ann:hunter2@host/shards", out="out")
    assert "hunter2" not in str(found.value)
    RunConfig.__post_init__(dataclasses.replace(config, storage="sftp://ann@host/runs"))


def test_missing_key_and_broken_json_name_the_file(config):
    tree = json.loads(to_json(config))
    del tree["storage"]
    with pytest.raises(ValueError, match=r"run\.json: the key 'storage' is missing"):
        from_json(json.dumps(tree), "run.json")
    with pytest.raises(ValueError, match=r"run\.json: not JSON"):
        from_json("{", "run.json")


def test_zero_stage_3_and_too_many_workers_are_refused_when_built(config):
    with pytest.raises(ValueError, match="zero_stage 3"):
        EngineConfig(zero_stage=3)
    with pytest.raises(ValueError, match=r"6 is more than the 5 slots of the sources"):
        dataclasses.replace(config, launch=LaunchConfig(workers=6))


def test_what_the_engine_leaves_open_is_decided_by_the_device():
    fast = EngineConfig(
        precision="bf16", tf32=True, channels_last=True, cudnn_benchmark=True,
        fused_optimizer=True, ordered_sums=False,
    )  # fmt: skip
    plain = EngineConfig(
        precision="fp32", tf32=False, channels_last=False, cudnn_benchmark=False,
        fused_optimizer=False, ordered_sums=True,
    )  # fmt: skip
    assert EngineConfig().on("cuda:1") == fast and EngineConfig().on("cpu") == plain
    assert fast.on("cpu") == fast and plain.on("cuda") == plain


@pytest.fixture
def switches():
    cudnn = torch.backends.cudnn
    found = [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (cudnn, "allow_tf32"),
        (cudnn, "benchmark"),
    ]
    before = [getattr(*switch) for switch in found]
    yield found
    for switch, value in zip(found, before, strict=True):
        setattr(*switch, value)


def test_kernels_are_set_up_for_cuda_alone(switches):
    for is_fast in (True, False):
        set_kernels(EngineConfig(tf32=is_fast, cudnn_benchmark=is_fast).on("cuda"), "cuda:1")
        set_kernels(EngineConfig(tf32=not is_fast, cudnn_benchmark=not is_fast).on("cpu"), "cpu")
        assert [getattr(*switch) for switch in switches] == [is_fast] * 3
        with evaluation_mode(torch.nn.Identity()):
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark == is_fast


def test_a_stride_beyond_the_window_is_refused():
    with pytest.raises(ValueError, match=r"stride 600 is larger than validation.window 512"):
        ValidationConfig("val", mode="slide", stride=600)
    with pytest.raises(ValueError, match=r"stride \(9, 9\) is larger than .*window \(16, 8\)"):
        ValidationConfig("val", window=(16, 8), stride=(9, 9))
    with pytest.raises(ValueError, match=r"validation.window is \(0, 8\); it must be one side or"):
        ValidationConfig("val", window=(0, 8), stride=1)


def test_rectangles_survive_json(config):
    source = dataclasses.replace(config.sources[0], augment=AugmentConfig(crop=(48, 96)))
    validation = ValidationConfig("val", window=(48, 96), stride=(48, 64))
    run = dataclasses.replace(config, sources=(source, *config.sources[1:]), validation=validation)
    assert from_json(to_json(run)) == run


def test_paths_become_absolute_and_urls_stay(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = dataclasses.replace(
        config, storage="runs", validation=ValidationConfig("s3://bucket/val")
    )
    absolute = with_absolute_paths(relative)
    assert absolute.storage == str(tmp_path / "runs")
    assert absolute.directory == str(tmp_path / "runs" / "run")
    assert absolute.validation is not None and absolute.validation.path == "s3://bucket/val"
    assert [source.saliency for source in absolute.sources] == [None, None]
    with_maps = tuple(
        dataclasses.replace(source, saliency=maps)
        for source, maps in zip(config.sources, ("maps", "s3://bucket/maps"), strict=True)
    )
    absolute = with_absolute_paths(dataclasses.replace(config, sources=with_maps))
    found = [source.saliency for source in absolute.sources]
    assert found == [str(tmp_path / "maps"), "s3://bucket/maps"]
    with_lists = tuple(
        dataclasses.replace(source, split=split, pseudo_masks=masks)
        for source, split, masks in zip(
            config.sources, ("1_16", "lists/1_16.txt"), ("masks", None), strict=True
        )
    )
    absolute = with_absolute_paths(dataclasses.replace(config, sources=with_lists))
    found = [(source.split, source.pseudo_masks) for source in absolute.sources]
    assert found == [("1_16", str(tmp_path / "masks")), (str(tmp_path / "lists/1_16.txt"), None)]


def test_a_url_cannot_hold_the_cache(config):
    remote = dataclasses.replace(config, storage="s3://bucket/runs")
    with pytest.raises(ValueError, match=r"set loader.cache_dir to a local directory"):
        _ = remote.cache_directory


def test_flat_leaves_for_a_tracker(config):
    flat = flatten(config)
    assert flat["optimizer.lr"] == "0.02"
    assert flat["sources.weak.slots"] == "2"
    assert flat["method.kind"] == "larvseg"


def test_command_line_changes_one_leaf(config):
    arguments = ["--optimizer.lr", "0.5", "--launch.workers", "2", "--steps", "9"]
    found = tyro.cli(
        RunConfig, default=config, args=arguments, config=(tyro.conf.AvoidSubcommands,)
    )
    assert (found.optimizer.lr, found.launch.workers, found.steps) == (0.5, 2, 9)
    assert found.optimizer == OptimizerConfig(lr=0.5, clip_norm=1.0)
