import dataclasses

import pytest
import timm
import torch
from torch import nn

from memseg_dist.models.backbone import BackboneConfig, build_backbone, save_backbone
from memseg_dist.models.batchnorm import commit_statistics, record_batchnorm, set_slot
from memseg_dist.models.cosine import CosineClassifier
from memseg_dist.models.resnet38 import ResNet38

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
        assert backbone(images(height, width)).shape == (2, dim, rows, columns)


@pytest.mark.parametrize("config", [TINY_VIT, RESNET, VGG, RESNET38, FROZEN])
def test_activation_checkpointing_changes_nothing(config):
    config = dataclasses.replace(config, drop_path=0)
    torch.manual_seed(0)
    backbone = build_backbone(config)
    x = images(64, 64)

    def gradients():
        backbone.zero_grad()
        torch.manual_seed(1)  # dropout
        backbone(x).square().mean().backward()
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


def test_padding_is_zero_after_normalisation():
    backbone = build_backbone(RESNET).eval()
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    valid[:, 32:] = False
    x = images(64, 64)
    other = x.clone()
    other[:, :, 32:] = 77
    assert torch.equal(backbone(x, valid), backbone(other, valid))


def test_weights_go_through_a_file_and_position_embeddings_are_resized(tmp_path):
    path = tmp_path / "backbone.safetensors"
    backbone = build_backbone(TINY_VIT).eval()
    save_backbone(backbone, path)
    same = build_backbone(dataclasses.replace(TINY_VIT, pretrained=str(path))).eval()
    x = images(64, 64)
    assert torch.equal(same(x), backbone(x))
    larger = dataclasses.replace(TINY_VIT, pretrained=str(path), image_size=96)
    assert build_backbone(larger)(images(96, 96)).shape == (2, 48, 12, 12)


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
    torch.testing.assert_close(plain(x), theirs(pixels))


def test_vgg16_takes_over_hub_weights(monkeypatch):
    hub = build_backbone(dataclasses.replace(VGG, output_stride=32))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: hub.net)
    config = BackboneConfig("vgg16.tv_in1k", "hub", output_stride=8, options=VGG.options)
    found = build_backbone(config)
    for name, tensor in hub.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


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
    assert net.dim == 4096


@pytest.mark.parametrize(("config", "side"), [(VGG, 280), (RESNET38, 640)])
def test_a_shift_by_the_stride_is_a_shift_of_the_map(config, side):
    """In the middle, out of the reach of the borders: pools and strides are where they belong."""
    torch.manual_seed(0)
    backbone = build_backbone(config).eval()
    x = images(side, side)[:1]
    with torch.no_grad():
        whole, shifted = backbone(x), backbone(x.roll((8, -16), (2, 3)))
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
    model = nn.Sequential(backbone, record_batchnorm(nn.BatchNorm2d(256)))
    set_slot(model, 0)
    model(images(32, 32)).square().mean().backward()
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
    assert torch.equal(same(x), backbone(x))


@pytest.mark.parametrize(
    "config, message",
    [
        (dataclasses.replace(VGG, output_stride=4), "output_stride of vgg16 is 4; use 8, 16 or 32"),
        (dataclasses.replace(RESNET38, output_stride=16), "resnet38 is 16; it must be 8"),
        (dataclasses.replace(RESNET38, pretrained="hub"), "no hub has resnet38; give a .safe"),
        (dataclasses.replace(VGG, options={"width": "0.01"}), "vgg16 is 0.01; it must be a mult"),
        (dataclasses.replace(VGG, options={"depth": "3"}), "'vgg16' with .*'depth'"),
    ],
)
def test_settings_that_our_own_nets_lack_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(config)


def test_wrong_names_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="backbone 'resnet_of_nowhere' is no timm model"):
        build_backbone(BackboneConfig("resnet_of_nowhere"))
    with pytest.raises(ValueError, match=r"nothing\.safetensors' do not exist"):
        build_backbone(dataclasses.replace(RESNET, pretrained="nothing.safetensors"))
    path = tmp_path / "vit.safetensors"
    save_backbone(build_backbone(TINY_VIT), path)
    with pytest.raises(ValueError, match="do not fit"):
        build_backbone(dataclasses.replace(RESNET, pretrained=str(path)))


def run_batchnorm(num_slots: int):
    from memseg_dist import dist

    torch.manual_seed(0)
    model = record_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    for step in range(3):
        slots = [*range(dist.rank(), num_slots, dist.size())]
        slots += [None] * (-(-num_slots // dist.size()) - len(slots))
        for slot in slots:
            generator = torch.Generator().manual_seed(10 * step + (slot or 0))
            set_slot(model, slot)
            x = torch.randn(2, 3, 8, 8, generator=generator)
            model(x)
            model(x)  # recomputed activations
        commit_statistics(model)
    return model[1].running_mean, model[1].running_var


def test_running_statistics_do_not_depend_on_the_number_of_workers(process_pool):
    mean, variance = run_batchnorm(5)
    assert (mean - 0).abs().max() > 0
    for world_size in (2, 4):
        for got_mean, got_variance in process_pool(world_size).run(run_batchnorm, 5):
            torch.testing.assert_close(got_mean, mean)
            torch.testing.assert_close(got_variance, variance)


def test_one_slot_moves_statistics_as_batchnorm_does():
    torch.manual_seed(0)
    ours, theirs = record_batchnorm(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    set_slot(ours, 0)
    torch.testing.assert_close(ours(x), theirs(x))
    commit_statistics(ours)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_cosine_classifier_gives_unit_vectors():
    classifier = CosineClassifier(10, 6)
    x = classifier.embed(torch.randn(2, 6, 3, 4))
    assert x.shape == (2, 12, 6)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(2, 12))
    w = classifier.class_weights(torch.tensor([1, 5]))
    torch.testing.assert_close(w.norm(dim=-1), torch.ones(2))
