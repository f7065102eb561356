"""Weights that a backbone starts from: had on this machine before anything needs them."""

from __future__ import annotations

from pathlib import Path

import timm
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

HUB_FILE = "model.safetensors"


def fetch_weights(name: str, pretrained: str) -> None:
    """Download the hub's weights of the backbone `name` unless they are here; or check the file.

    pretrained: as `BackboneConfig.pretrained`. ValueError for a hub that cannot be reached, within
    seconds, and for a file that is missing, cut short or of another kind.
    """
    if pretrained == "hub":
        _download(name)
    elif pretrained:
        _check_file(pretrained)


def _download(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    repository = config.hf_hub_id if config is not None else None
    if repository is None or isinstance(try_to_load_from_cache(repository, HUB_FILE), str):
        return
    try:
        # asks once, where timm goes on asking for 48 seconds
        get_hf_file_metadata(hf_hub_url(repository, HUB_FILE))
        hf_hub_download(repository, HUB_FILE)
    except EntryNotFoundError:
        return  # timm knows other names of the file
    except Exception as error:  # of the HTTP client, which differs by version
        raise ValueError(
            f"the weights of backbone '{name}' cannot be fetched from {repository} on timm's hub "
            f"({error}); give a file of them: --backbone.pretrained FILE.safetensors, or '' for "
            "random weights"
        ) from error


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise ValueError(
            f"backbone weights '{path}' do not exist; write them (python jobs/pretrain_scenes.py, "
            "or jobs/pretrain_folder.py for your own pictures), or give another .safetensors file "
            "or 'hub'"
        )
    if Path(path).suffix != ".safetensors":
        convert = (
            "import torch; from safetensors.torch import save_file; save_file({k: v.contiguous() "
            f"for k, v in torch.load('{path}', weights_only=True).items()}}, "
            f"'{Path(path).with_suffix('.safetensors')}')"
        )
        raise ValueError(
            f"backbone weights '{path}' are no .safetensors file; convert them: {convert}"
        )
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"backbone weights '{path}' are cut short or no .safetensors file: {error}; fetch or "
            "convert them again"
        ) from error
