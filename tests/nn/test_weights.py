"""Weights are there before a run starts, or one error says what to give."""

import pytest

from memseg_dist.nn import weights
from memseg_dist.nn.backbone import BackboneConfig, build_backbone


def test_a_hub_that_cannot_be_reached_is_one_error(monkeypatch):
    def no_network(url):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(weights, "get_hf_file_metadata", no_network)
    with pytest.raises(
        ValueError, match=r"from timm/resnet50\..*not known.*--backbone\.pretrained"
    ):
        build_backbone(BackboneConfig("resnet50.a1_in1k", "hub", drop_path=0.0))


def test_weights_of_the_hub_are_fetched_once(monkeypatch):
    fetched = []
    monkeypatch.setattr(weights, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(weights, "hf_hub_download", lambda *file: fetched.append(file))
    monkeypatch.setattr(
        weights, "try_to_load_from_cache", lambda *file: "/here" if fetched else None
    )
    for _ in range(2):
        weights.fetch_weights("resnet50.a1_in1k", "hub")
    assert fetched == [("timm/resnet50.a1_in1k", "model.safetensors")]
