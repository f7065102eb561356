import copy
import dataclasses
import json
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from memseg_dist.nn.backbone import (
    BackboneConfig,
    FeatureStage,
    build_backbone,
    save_backbone,
)
from memseg_dist.nn.batchnorm import (
    check_recorded,
    commit_statistics,
    record_batchnorm,
    recording,
)
from memseg_dist.nn.resnet38 import ResNet38

TINY_VIT = BackboneConfig(
    "vit_tiny_patch16_224", image_size=64, drop_path=0.1,
    options={"patch_size": "8", "embed_dim": "48", "depth": "2"},
)  # fmt: skip
RESNET = BackboneConfig("resnet10t", output_stride=8, drop_path=0)
CONVNEXT = BackboneConfig("convnext_atto", drop_path=0)
VGG = BackboneConfig("vgg16", output_stride=8, options={"width": "0.125"})
RESNET38 = BackboneConfig("resnet38", options={"width": "0.0625"})
FROZEN = dataclasses.replace(RESNET38, options={"width": "0.0625", "frozen": "true"})


def images(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("config", "dim", "stride"),
    [
        (TINY_VIT, 48, 8), (RESNET, 512, 8), (CONVNEXT, 320, 32), (VGG, 64, 8), (RESNET38, 256, 8),
        (dataclasses.replace(VGG, output_stride=16), 64, 16),
        (dataclasses.replace(VGG, output_stride=None), 64, 32),
    ],
)  # fmt: skip
def test_any_size_gives_a_map(config, dim, stride):
    backbone = build_backbone(config).eval()
    assert (backbone.dim, backbone.stride) == (dim, stride)
    for height, width in [(64, 64), (64, 90)]:
        rows, columns = -(-height // stride), -(-width // stride)
        (features,) = backbone(images(height, width))
        assert features.shape == (2, dim, rows, columns)


@pytest.mark.parametrize(
    ("config", "bf16"),
    [(c, False) for c in (TINY_VIT, RESNET, VGG, RESNET38, FROZEN)]
    + [(c, True) for c in (TINY_VIT, RESNET, VGG)],
)
def test_activation_checkpointing_changes_nothing(config, bf16):
    config = dataclasses.replace(config, drop_path=0)
    torch.manual_seed(0)
    backbone = build_backbone(config, bf16=bf16)
    x = images(64, 64)

    def gradients():
        backbone.zero_grad()
        torch.manual_seed(1)  # dropout
        backbone(x)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in backbone.named_parameters() if p.requires_grad}

    def kept_bytes(function):
        total = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: total.append(t.nbytes) or t, lambda t: t
        ):
            function(x)
        return sum(total)

    plain, before = gradients(), kept_bytes(backbone)
    backbone.set_activation_checkpointing(True)
    assert kept_bytes(backbone) < 0.8 * before
    for name, found in gradients().items():
        torch.testing.assert_close(found, plain[name], msg=name)


def tiny(name: str, **options) -> BackboneConfig:
    values = {key: json.dumps(value) for key, value in options.items()}
    return BackboneConfig(name, image_size=64, drop_path=0, options=values)


BEIT = tiny("beit_base_patch16_224", embed_dim=24, depth=3, num_heads=2)
SWIN = tiny(
    "swin_tiny_patch4_window7_224", embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4]
)


@pytest.mark.parametrize(
    ("config", "dims", "strides"),
    [
        (TINY_VIT, (48, 48), (8, 8)),
        (tiny("deit_tiny_distilled_patch16_224", embed_dim=48, depth=3), (48, 48), (16, 16)),
        (tiny("eva02_tiny_patch14_224", embed_dim=48, depth=3), (48, 48), (14, 14)),
        (BEIT, (24, 24), (16, 16)),
        (SWIN, (12, 96), (4, 32)),
        (RESNET, (64, 512), (2, 8)),
        (tiny("resnest14d"), (64, 2048), (2, 32)),
        (tiny("convnext_atto"), (40, 320), (4, 32)),
        (tiny("hrnet_w18_small"), (64, 1024), (2, 32)),
        (tiny("efficientnet_lite0"), (16, 320), (2, 32)),
        (tiny("mobilenetv3_small_050"), (16, 288), (2, 32)),
        (tiny("mambaout_femto", depths=[1, 1, 1, 1]), (48, 288), (4, 32)),
        (VGG, (8, 64), (2, 8)),
        (RESNET38, (8, 256), (2, 8)),
    ],
    ids=lambda value: value.name if isinstance(value, BackboneConfig) else None,
)
def test_every_family_gives_the_stages_asked_for(config, dims, strides):
    backbone = build_backbone(config, (0, -1), bf16=True)
    assert tuple((s.dim, s.stride) for s in backbone.stages) == tuple(zip(dims, strides))
    assert (backbone.dim, backbone.stride) == (dims[-1], strides[-1])
    height, width = (64, 64) if config is BEIT else (64, 90)
    rows, columns = -(-height // strides[-1]), -(-width // strides[-1])
    maps = backbone(images(height, width))
    for features, dim, stride in zip(maps, dims, strides, strict=True):
        scale = strides[-1] // stride
        assert features.shape == (2, dim, rows * scale, columns * scale)
        assert features.dtype == torch.float32
    maps[-1].square().mean().backward()
    stem = next(layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d))
    assert stem.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("config", [TINY_VIT, RESNET, SWIN, tiny("hrnet_w18_small"), VGG, RESNET38])
def test_a_shallow_stage_alone_is_the_same_map(config):
    torch.manual_seed(0)
    both = build_backbone(config, (0, -1)).eval()
    torch.manual_seed(0)
    alone = build_backbone(config, (0,)).eval()
    x = images(64, 96)
    (features,) = alone(x)
    torch.testing.assert_close(features, both(x)[0])
    (features,) = alone(images(50, 70))
    stride = alone.stride
    assert features.shape[-2:] == (-(-50 // stride), -(-70 // stride))


@pytest.mark.parametrize("config", [TINY_VIT, RESNET, SWIN, VGG, RESNET38])
def test_a_net_stops_at_its_last_stage(config):
    """As the whole net's stage, and from the end counted there; conv nets build no more."""
    nets = []
    for last, stage in ((None, 1), (1, -1)):
        torch.manual_seed(0)
        nets.append(build_backbone(dataclasses.replace(config, last_stage=last), (stage,)).eval())
    whole, cut = nets
    x = images(64, 96)
    torch.testing.assert_close(cut(x)[0], whole(x)[0])
    build_backbone(dataclasses.replace(config, last_stage=1), (-2, -1))
    for last in (-1, 99):
        with pytest.raises(ValueError, match=f"backbone.last_stage {last}: .*stages 0 to"):
            build_backbone(dataclasses.replace(config, last_stage=last))


def test_the_small_net_for_studies_on_few_cores():
    config = BackboneConfig("tf_efficientnet_lite0", last_stage=3, output_stride=8, drop_path=0.0)
    backbone = build_backbone(config)
    assert backbone.stages == (FeatureStage(112, 8),)
    assert round(sum(p.numel() for p in backbone.parameters()) / 1e6, 2) == 0.70


def test_hrnets_branches_as_they_are():
    config = tiny("hrnet_w18_small", feature_location="")
    backbone = build_backbone(config, (-4, -3, -2, -1))
    assert [(s.dim, s.stride) for s in backbone.stages] == [(16, 4), (32, 8), (64, 16), (128, 32)]
    assert [map.shape[1:] for map in backbone(images(64, 96))] == [
        (16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="feature_location"):
        build_backbone(tiny("vit_tiny_patch16_224", feature_location=""))


def test_the_file_of_an_hrnet_fills_its_branches(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.manual_seed(1)
    whole = timm.create_model("hrnet_w18_small")
    save_file(whole.state_dict(), path)
    config = dataclasses.replace(tiny("hrnet_w18_small", feature_location=""), pretrained=str(path))
    net = build_backbone(config, (-1,)).net
    assert torch.equal(net.conv1.weight, whole.conv1.weight)
    last = "stage4.0.fuse_layers.3.2.0.0.weight"
    assert torch.equal(net.state_dict()[last], whole.state_dict()[last])


def test_every_map_of_a_vit_goes_through_the_final_norm():
    backbone = build_backbone(TINY_VIT, (0, 1)).eval()
    backbone.net.norm.weight.data.uniform_(1, 2)
    x = images(64, 64)
    pixels = (x - backbone.mean) / backbone.std
    tokens = backbone.net._pos_embed(backbone.net.patch_embed(pixels))
    for block, features in zip(backbone.net.blocks, backbone(x), strict=True):
        tokens = block(tokens)
        expected = backbone.net.norm(tokens)[:, 1:].mT.unflatten(2, (8, 8))
        torch.testing.assert_close(features, expected)


def test_stages_of_our_own_nets_follow_each_other():
    x = images(64, 64)
    backbone = build_backbone(VGG, range(5)).eval()
    maps = backbone(x)
    layers = iter(backbone.net.features)
    pixels = (x - backbone.mean) / backbone.std
    for features, num_layers in zip(maps, (5, 5, 7, 7, 6), strict=True):
        for _ in range(num_layers):
            pixels = next(layers)(pixels)
        assert torch.equal(features, pixels)
    backbone = build_backbone(RESNET38, (3, 4, 5)).eval()
    b5, b6, b7 = backbone(x)
    assert torch.equal(b6, backbone.net.b6(b5))
    assert torch.equal(b7, backbone.net.norm(backbone.net.b7(b6)).relu())


@pytest.mark.parametrize("stages", [(), (2,), (-3,), (1, 0), (0, -2)])
def test_stages_that_there_are_not_are_named(stages):
    with pytest.raises(ValueError, match=r"stages \(.*'vit_tiny.*one or more from -2 to 1, ascend"):
        build_backbone(TINY_VIT, stages)


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (
            TINY_VIT,
            {
                "num_classes": 0, "global_pool": "", "img_size": 64, "dynamic_img_size": True,
                "patch_size": 8, "embed_dim": 48, "depth": 2, "drop_path_rate": 0.1,
            },
        ),
        (RESNET, {"features_only": True, "out_indices": [-1], "output_stride": 8}),
    ],
)  # fmt: skip
def test_weights_are_drawn_as_timm_draws_them(config, arguments):
    torch.manual_seed(3)
    theirs = timm.create_model(config.name, **arguments)
    next_number = torch.rand(1)
    torch.manual_seed(3)
    ours = build_backbone(config).net
    assert torch.equal(torch.rand(1), next_number)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("config", [TINY_VIT, CONVNEXT])
def test_precision_is_the_backbones_own(config):
    torch.manual_seed(0)
    plain = build_backbone(dataclasses.replace(config, drop_path=0)).eval()
    torch.manual_seed(0)
    half = build_backbone(dataclasses.replace(config, drop_path=0), bf16=True).eval()
    kinds = set()
    for backbone in (plain, half):
        inner = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        inner[1].register_forward_hook(lambda *seen: kinds.add(seen[-1].dtype))
    x = images(64, 64)
    (expected,) = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x)[0], expected)
    assert kinds == {torch.float32}
    (features,) = half(x)
    assert kinds == {torch.float32, torch.bfloat16} and features.dtype == torch.float32
    assert not torch.equal(features, expected)
    torch.testing.assert_close(features, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("config", [RESNET, VGG, RESNET38, CONVNEXT])
def test_channels_last_reaches_every_convolution_and_leaves_the_weights(config):
    nets = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        config = dataclasses.replace(config, drop_path=0)
        nets.append(build_backbone(config, channels_last=channels_last).double().eval())
    last = nets[1]
    seen = []
    for layer in last.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x, valid = images(48, 80), torch.rand(2, 48, 80) > 0.1  # filled up to whole positions
    gradients = []
    for net in nets:
        net(x, valid)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert seen and all(map.is_contiguous(memory_format=torch.channels_last) for map in seen)
    for name, parameter in last.named_parameters():
        assert parameter.is_contiguous() and parameter.grad.is_contiguous(), name
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("config", [TINY_VIT, RESNET])
def test_compiled_it_is_the_same_net_and_compiles_once_for_all_slots(monkeypatch, config):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = build_backbone(config).train()
    compiled = copy.deepcopy(plain)
    compiled.compile()
    x, graphs = images(64, 64), []
    for slot in range(3):
        found = []
        for net in (plain, compiled):
            net.zero_grad()
            torch.manual_seed(slot)  # drop path
            with recording(net, slot):
                (features,) = net(x)
            features.square().mean().backward()
            found.append([features, *(p.grad for p in net.parameters() if p.grad is not None)])
        torch.testing.assert_close(found[1], found[0])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] > 0
    for net in (plain, compiled):
        commit_statistics(net)
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


def test_padding_is_zero_after_normalisation():
    backbone = build_backbone(RESNET).eval()
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    valid[:, 32:] = False
    x = images(64, 64)
    other = x.clone()
    other[:, :, 32:] = 77
    assert torch.equal(backbone(x, valid)[0], backbone(other, valid)[0])


def test_weights_go_through_a_file_and_position_embeddings_are_resized(tmp_path):
    path = tmp_path / "backbone.safetensors"
    backbone = build_backbone(TINY_VIT).eval()
    save_backbone(backbone, path)
    same = build_backbone(dataclasses.replace(TINY_VIT, pretrained=str(path))).eval()
    x = images(64, 64)
    assert torch.equal(same(x)[0], backbone(x)[0])
    larger = dataclasses.replace(TINY_VIT, pretrained=str(path), image_size=96)
    assert build_backbone(larger)(images(96, 96))[0].shape == (2, 48, 12, 12)


def test_vgg16_has_the_papers_layers_and_timms_names():
    backbone = build_backbone(BackboneConfig("vgg16", output_stride=8))
    assert sum(p.numel() for p in backbone.parameters()) == 14_714_688
    convolutions = [layer for layer in backbone.net.features if isinstance(layer, nn.Conv2d)]
    assert [layer.dilation[0] for layer in convolutions] == 10 * [1] + 3 * [2]
    with torch.device("meta"):
        theirs = timm.create_model("vgg16", num_classes=0).features
    theirs.to_empty(device="cpu").load_state_dict(backbone.net.features.state_dict())
    plain = build_backbone(BackboneConfig("vgg16"))
    plain.load_state_dict(backbone.state_dict())
    x = images(64, 96)
    pixels = (x - plain.mean) / plain.std
    torch.testing.assert_close(plain(x)[0], theirs(pixels))


def test_resnet38_has_the_papers_size():
    wide = [(64, 128, 128), *2 * [(128, 128, 128)], (128, 256, 256), *2 * [(256, 256, 256)]]
    wide += [(256, 512, 512), *5 * [(512, 512, 512)], (512, 512, 1024), *2 * [(1024, 512, 1024)]]
    total = 9 * 3 * 64 + 2 * 4096
    for in_dim, inner, dim in wide:
        total += 9 * in_dim * inner + 9 * inner * dim + 2 * in_dim + 2 * inner
        total += in_dim * dim if in_dim != dim else 0
    for in_dim, dim in [(1024, 2048), (2048, 4096)]:
        total += in_dim * dim // 4 + 9 * dim // 4 * dim // 2 + dim // 2 * dim + in_dim * dim
        total += 2 * in_dim + 2 * dim // 4 + 2 * dim // 2
    with torch.device("meta"):
        net = ResNet38()
    assert sum(p.numel() for p in net.parameters()) == total == 105_070_912
    assert net.feature_info.channels() == [4096]


@pytest.mark.parametrize(("config", "side"), [(VGG, 280), (RESNET38, 640)])
def test_a_shift_by_the_stride_is_a_shift_of_the_map(config, side):
    """In the middle, out of the reach of the borders: pools and strides are where they belong."""
    torch.manual_seed(0)
    backbone = build_backbone(config).eval()
    x = images(side, side)[:1]
    with torch.no_grad():
        (whole,), (shifted,) = backbone(x), backbone(x.roll((8, -16), (2, 3)))
    middle = side // 16
    torch.testing.assert_close(
        shifted[..., middle + 1, middle - 2], whole[..., middle, middle], rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(whole[..., middle, middle], whole[..., middle + 1, middle], rtol=1e-2)


def test_frozen_resnet38_stays_frozen():
    torch.manual_seed(0)
    backbone = build_backbone(FROZEN)
    backbone.train()
    net = backbone.net
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert net.b6.dropout.training and not any(norm.training for norm in norms)
    fixed = {id(p) for part in (net.conv1, net.b2, *norms) for p in part.parameters()}
    assert {id(p) for p in net.parameters() if not p.requires_grad} == fixed
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = nn.ModuleList([backbone, record_batchnorm(nn.BatchNorm2d(256))])
    with recording(model, 0):
        (features,) = backbone(images(32, 32))
        model[1](features).square().mean().backward()
    commit_statistics(model)
    assert all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())
    assert net.b3[0].conv1.weight.grad is not None and net.conv1.weight.grad is None
    assert (model[1].running_mean != 0).any()  # the norm that is not frozen did move


@pytest.mark.parametrize("config", [VGG, RESNET38])
def test_weights_of_our_own_nets_go_through_a_file(config, tmp_path):
    path = tmp_path / "backbone.safetensors"
    backbone = build_backbone(config).eval()
    save_backbone(backbone, path)
    same = build_backbone(dataclasses.replace(config, pretrained=str(path))).eval()
    x = images(32, 40)
    assert torch.equal(same(x)[0], backbone(x)[0])


@pytest.mark.parametrize(
    "config, message",
    [
        (dataclasses.replace(RESNET38, output_stride=16), "resnet38 is 16; it must be 8"),
        (dataclasses.replace(RESNET38, pretrained="hub"), "'hub' do not fit 'resnet38': Unknown"),
        (dataclasses.replace(VGG, options={"width": "0.01"}), "vgg16 is 0.01; it must be a mult"),
        (dataclasses.replace(VGG, options={"depth": "3"}), "'vgg16' with .*'depth'"),
    ],
)
def test_settings_that_our_own_nets_lack_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(config)


def test_an_output_stride_that_no_net_has_is_named():
    with pytest.raises(ValueError, match=r"backbone\.output_stride is 7; it must be 8, 16 or 32"):
        BackboneConfig("resnet18", output_stride=7)
    with pytest.raises(ValueError, match=r"'hrnet_w18_small' with .*: the net does not take these"):
        build_backbone(BackboneConfig("hrnet_w18_small", output_stride=8))


def test_wrong_names_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="backbone 'resnet_of_nowhere' is no timm model"):
        build_backbone(BackboneConfig("resnet_of_nowhere"))
    with pytest.raises(ValueError, match=r"nothing\.safetensors' do not exist.*jobs/pretrain_s"):
        build_backbone(dataclasses.replace(RESNET, pretrained="nothing.safetensors"))
    path = tmp_path / "vit.safetensors"
    save_backbone(build_backbone(TINY_VIT), path)
    with pytest.raises(ValueError, match="do not fit"):
        build_backbone(dataclasses.replace(RESNET, pretrained=str(path)))


def saved_by_timm(path, name: str, **arguments) -> dict[str, torch.Tensor]:
    weights = timm.create_model(name, **arguments).state_dict()
    save_file(weights, path)
    return weights


def pretrained(config: BackboneConfig, path, stages=(-1,)) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    config = dataclasses.replace(config, pretrained=str(path))
    return build_backbone(config, stages).net.state_dict()


@pytest.mark.parametrize(
    ("name", "num_classes", "stages"),
    [
        ("resnet10t", 0, (-1,)),
        ("resnet10t", 7, (0, 2)),
        ("convnext_atto", 7, (-1,)),
        ("convnext_atto", 7, (0,)),
        ("mobilenetv3_small_050", 7, (0, 2)),
        ("hrnet_w18_small", 7, (0, -1)),
    ],
)
def test_timms_own_file_fits_a_feature_net(name, num_classes, stages, tmp_path):
    path = tmp_path / "model.safetensors"
    theirs = saved_by_timm(path, name, num_classes=num_classes)
    theirs = {name.replace(".", "_"): tensor for name, tensor in theirs.items()}
    ours = pretrained(tiny(name), path, stages)
    assert all(torch.equal(ours[name], theirs[name.replace(".", "_")]) for name in ours)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_timms_own_file_fits_a_vit_of_another_size(num_classes, tmp_path):
    path = tmp_path / "model.safetensors"
    shape = {"patch_size": 8, "embed_dim": 48, "depth": 2}
    theirs = saved_by_timm(path, TINY_VIT.name, img_size=96, num_classes=num_classes, **shape)
    ours = pretrained(TINY_VIT, path)
    grid = theirs.pop("pos_embed")[:, 1:].mT.unflatten(2, (12, 12))
    grid = nn.functional.interpolate(grid, (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(ours.pop("pos_embed")[:, 1:], grid.flatten(2).mT)
    assert theirs.keys() - ours.keys() <= {"head.weight", "head.bias"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pooled_vits_norm_is_that_of_the_map(tmp_path):
    path = tmp_path / "model.safetensors"
    shape = {"embed_dim": 24, "depth": 3, "num_heads": 2}
    theirs = timm.create_model(BEIT.name, img_size=64, num_classes=5, **shape)
    theirs.fc_norm.weight.data.uniform_()
    save_file(theirs.state_dict(), path)
    assert torch.equal(pretrained(BEIT, path)["norm.weight"], theirs.fc_norm.weight)


def test_vgg16_takes_timms_weights_at_any_output_stride(tmp_path):
    path = tmp_path / "model.safetensors"
    names = [f"features.{n}" for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    theirs = build_backbone(VGG).net.state_dict()
    save_file(theirs | {"head.fc.weight": torch.zeros(7, 4)}, path)
    ours = pretrained(VGG, path)
    assert list(ours) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    save_file({"head.fc.weight": torch.zeros(7, 4)}, path)
    with pytest.raises(ValueError, match=r"do not fit 'vgg16'.*features\.0\.weight"):
        pretrained(VGG, path)


def test_real_weights_are_read(real_data):
    path = real_data / "weights" / "tf_efficientnet_lite0.safetensors"
    if not path.is_file():
        pytest.skip(f"no real weights at {path}")
    theirs = load_file(path)
    ours = pretrained(BackboneConfig("tf_efficientnet_lite0", drop_path=0), path, (1, -1))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_reading_weights_draws_no_random_numbers(tmp_path):
    path = tmp_path / "model.safetensors"
    saved_by_timm(path, "resnet10t", num_classes=7)
    numbers = []
    for where in ("", str(path)):
        torch.manual_seed(0)
        build_backbone(dataclasses.replace(RESNET, pretrained=where))
        numbers.append(torch.rand(1))
    assert torch.equal(*numbers)


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = saved_by_timm(path, "resnet10t", num_classes=7)
    config = dataclasses.replace(RESNET, pretrained=str(path))
    changes = {
        r"Missing key.*layer1\.0\.conv1\.weight": {"layer1.0.conv1.weight": None},
        r"Unexpected key.*layer9\.weight": {"layer9.weight": torch.zeros(3)},
        r"size mismatch for bn1\.bias": {"bn1.bias": torch.zeros(3)},
    }
    own = {
        f"net.{name}": tensor for name, tensor in build_backbone(RESNET).net.state_dict().items()
    }
    for message, change in changes.items():
        for prefix, whole in (("", weights), ("net.", own)):
            changed = whole | {prefix + name: tensor for name, tensor in change.items()}
            save_file({k: v for k, v in changed.items() if v is not None}, path)
            with pytest.raises(
                ValueError, match=rf"(?s)model\.safetensors' do not fit .*{message}"
            ):
                build_backbone(config)
    save_file({}, path)  # not taken for the hub
    with pytest.raises(ValueError, match=r"Missing key"):
        build_backbone(config)
    save_file({f"net.{name}": tensor for name, tensor in weights.items()}, path)
    with pytest.raises(ValueError, match=r"Unexpected key.*fc\.bias"):
        build_backbone(config)


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_backbone(build_backbone(RESNET), whole)
    cut, text = tmp_path / "cut.safetensors", tmp_path / "text.safetensors"
    cut.write_bytes(whole.read_bytes()[:-1000])
    text.write_text("version https://git-lfs")
    for path in (cut, text):
        with pytest.raises(
            ValueError, match=rf"{path.name}' are cut short or no .safetensors file"
        ):
            build_backbone(dataclasses.replace(RESNET, pretrained=str(path)))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_pickled_file_is_refused_with_the_line_that_converts_it(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    theirs = timm.create_model("resnet10t", num_classes=7).state_dict()
    torch.save(theirs, path)
    with pytest.raises(ValueError, match="convert them: import torch") as error:
        build_backbone(dataclasses.replace(RESNET, pretrained=str(path)))
    exec(str(error.value).partition("convert them: ")[2])  # the line does what it says
    ours = pretrained(RESNET, path.with_suffix(".safetensors"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "key",
    ["checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"],
)
def test_options_by_which_timm_reads_files_are_refused(key):
    with pytest.raises(ValueError, match=f"backbone.options has '{key}'"):
        BackboneConfig("resnet10t", options={key: '"x.pth"'})


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet", "resnet38"])
def test_frozen_batchnorm_stays_as_it_was_read(tmp_path, name):
    """In training: its output is that of evaluation, and no step changes it."""
    options = {"width": "0.0625"} if name == "resnet38" else {}
    config = BackboneConfig(name, drop_path=0, options=options)
    pretrained = build_backbone(config).train()
    for slot in range(2):
        with recording(pretrained, slot):
            pretrained(images(64, 64))
    commit_statistics(pretrained)
    path = str(tmp_path / "weights.safetensors")
    save_backbone(pretrained, path)
    frozen = build_backbone(dataclasses.replace(config, pretrained=path, frozen_batchnorm=True))
    x = images(64, 64)
    wanted = pretrained.eval()(x)[0]
    if name != "resnet38":  # has dropout
        torch.testing.assert_close(frozen.train()(x)[0], wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(frozen.eval()(x)[0], wanted, rtol=1e-3, atol=1e-3)
    check_recorded(frozen)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    optimizer = torch.optim.SGD(frozen.parameters(), 0.1, weight_decay=0.1)
    with recording(frozen.train(), 0):
        frozen(x)[0].square().mean().backward()
    optimizer.step()
    commit_statistics(frozen)
    norms = {name for name, _ in pretrained.named_buffers() if name.endswith("running_mean")}
    assert norms
    for norm in norms:
        for part in ("running_mean", "running_var", "weight", "bias"):
            key = norm.replace("running_mean", part)
            assert torch.equal(frozen.state_dict()[key], before[key]), key
    assert any(not torch.equal(t, before[k]) for k, t in frozen.state_dict().items())
    again = build_backbone(dataclasses.replace(config, frozen_batchnorm=True))
    again.load_state_dict(frozen.state_dict())
    save_backbone(frozen, path)
    build_backbone(dataclasses.replace(config, pretrained=path))  # a net that trains its BatchNorm
