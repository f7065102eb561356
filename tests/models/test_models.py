import dataclasses

import pytest
import torch
from torch import nn

from memseg_dist.models.backbone import BackboneConfig, build_backbone, save_backbone
from memseg_dist.models.batchnorm import commit_statistics, record_batchnorm, set_slot
from memseg_dist.models.cosine import CosineClassifier

TINY_VIT = BackboneConfig(
    "vit_tiny_patch16_224", image_size=64, drop_path=0.1,
    options={"patch_size": "8", "embed_dim": "48", "depth": "2"},
)  # fmt: skip
RESNET = BackboneConfig("resnet10t", output_stride=8, drop_path=0)
CONVNEXT = BackboneConfig("convnext_atto", drop_path=0)


def images(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("config", "dim", "stride"), [(TINY_VIT, 48, 8), (RESNET, 512, 8), (CONVNEXT, 320, 32)]
)
def test_any_size_gives_a_map(config, dim, stride):
    backbone = build_backbone(config).eval()
    assert (backbone.dim, backbone.stride) == (dim, stride)
    for height, width in [(64, 64), (64, 90)]:
        rows, columns = -(-height // stride), -(-width // stride)
        assert backbone(images(height, width)).shape == (2, dim, rows, columns)


@pytest.mark.parametrize("config", [TINY_VIT, RESNET])
def test_activation_checkpointing_changes_nothing(config):
    config = dataclasses.replace(config, drop_path=0)
    torch.manual_seed(0)
    backbone = build_backbone(config)
    x = images(64, 64)
    backbone(x).square().mean().backward()
    plain = [p.grad.clone() for p in backbone.parameters()]
    backbone.zero_grad()
    backbone.set_activation_checkpointing(True)
    backbone(x).square().mean().backward()
    for expected, parameter in zip(plain, backbone.parameters()):
        torch.testing.assert_close(parameter.grad, expected)


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
