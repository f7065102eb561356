"""The segmenter around the memory: Eq. 2 - 5 and 11 - 15.

Shape letters: B images, h x w positions, N of one image, C channels of R, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from memseg_dist.nn.attention import MapAttention
from memseg_dist.nn.backbone import FeatureStage
from memseg_dist.nn.batchnorm import record_batchnorm
from memseg_dist.nn.context import build_context
from memseg_dist.nn.resize import upsample

if TYPE_CHECKING:
    from memseg_dist.methods.mcibi.config import MCIBIConfig


class Classifier(nn.Module):
    """H1 and H2: 1 x 1 convolution, BatchNorm, ReLU, dropout, 1 x 1 convolution to K classes."""

    def __init__(self, dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout2d(dropout)
        self.logits = nn.Conv2d(dim, num_classes, 1)

    def forward(self, features: Tensor, *, by_running_statistics: bool = False) -> Tensor:
        """[B, C, h, w] -> [B, K, h, w]. by_running_statistics: normalise as in evaluation, and do
        not move the running statistics.
        """
        hidden, norm = self.hidden(features), self.norm
        if by_running_statistics:
            assert norm.running_mean is not None and norm.running_var is not None
            hidden = F.batch_norm(
                hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        else:
            hidden = norm(hidden)
        return self.logits(self.dropout(hidden.relu()))


class DatasetContext(nn.Module):
    """A_bi of Eq. 2 and the fusion of R with what it gives: what a segmenter gains by MCIBI.

    Table 3 calls it DCA; `benchmarks/complexity.py` counts it without H1.
    """

    def __init__(self, config: MCIBIConfig, dim: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.classify = Classifier(dim, num_classes, config.dropout)
        self.attention = MapAttention(dim, max(1, dim // 2), config.transform_layers)
        self.fuse = Conv2dNormActivation(2 * dim if config.fusion == "concat" else dim, dim, 3)
        if config.fusion == "weighted_add":
            self.weigh = nn.Conv2d(2 * dim, 2, 1)

    def forward(
        self, pixels_BChw: Tensor, codes_KC: Tensor | None, is_trained_K: Tensor
    ) -> tuple[Tensor, Tensor]:
        """codes: one vector per class; None: R stands for C'_bi (non-local attention). is_trained:
        bool, the classes that a source has; W gives the others nothing: no loss calibrates them.

        Returns the fused map [B, C, h, w] and W's logits [B, K, h, w], -inf where untrained.
        """
        logits_BKhw = self.classify(pixels_BChw)  # Eq. 11
        logits_BKhw = logits_BKhw.masked_fill(~is_trained_K[:, None, None], -torch.inf)
        gathered_BChw = pixels_BChw
        if codes_KC is not None:
            logits = logits_BKhw.detach() if self.config.detach_weights else logits_BKhw
            gathered_BChw = gather_codes(logits, codes_KC)
        context_BChw = self.attention(pixels_BChw, gathered_BChw)  # Eq. 13, 14
        return self.fuse(self._joined(pixels_BChw, context_BChw)), logits_BKhw

    def _joined(self, pixels_BChw: Tensor, context_BChw: Tensor) -> Tensor:
        """F of Eq. 4 before its convolution: the forms of Table 1."""
        if self.config.fusion == "add":
            return pixels_BChw + context_BChw
        both = torch.cat([pixels_BChw, context_BChw], dim=1)
        if self.config.fusion == "concat":
            return both
        weight_B2hw = self.weigh(both).softmax(dim=1)
        return weight_B2hw[:, :1] * pixels_BChw + weight_B2hw[:, 1:] * context_BChw


def gather_codes(logits_BKhw: Tensor, codes_KC: Tensor) -> Tensor:
    """C'_bi [B, C, h, w] of Eq. 12: the classes' vectors, weighted by their probabilities."""
    return torch.einsum("bkhw,kc->bchw", logits_BKhw.softmax(dim=1), codes_KC)


@dataclass(frozen=True)
class Outputs:
    """pixels: R [B, C, h, w]. logits: O before it is enlarged; distribution: W's logits, None
    without data-set context; auxiliary: of the auxiliary heads. All of K classes.
    """

    pixels: Tensor
    logits: Tensor
    distribution: Tensor | None
    auxiliary: tuple[Tensor, ...]


class Network(nn.Module):
    """Everything behind the backbone. ValueError for settings that do not fit its stages.

    trained: the label-space ids that a source has masks of; None: all. stride: pixels per position
    of R and of the logits.
    """

    codes: Tensor
    is_set: Tensor
    is_trained: Tensor

    def __init__(
        self,
        config: MCIBIConfig,
        stages: Sequence[FeatureStage],
        num_classes: int,
        trained: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        is_trained_K = torch.full((num_classes,), trained is None)
        if trained is not None:
            is_trained_K[trained] = True
        self.register_buffer("is_trained", is_trained_K, persistent=False)
        if config.pixels == "all" and len(stages) < 2:
            raise ValueError(
                "method.pixels 'all' joins the maps of several stages, and method.stages "
                f"{config.stages} asks for one; give two or more"
            )
        width = sum(s.dim for s in stages) if config.pixels == "all" else stages[-1].dim
        self.dim = dim = config.dim
        dropout = config.dropout
        self.down = None
        if config.downsample:
            self.down = Conv2dNormActivation(width, width, 3, stride=2)
        is_fine = config.pixels == "all" or config.context == "uper"
        self.stride = stages[0 if is_fine else -1].stride * (2 if config.downsample else 1)
        self.reduce = Conv2dNormActivation(width, dim, 3)
        self.auxiliary = nn.ModuleList(
            _plain_head(stages[index].dim, dim, num_classes, dropout) for index in config.aux_heads
        )
        inputs = [FeatureStage(width, stages[-1].stride)] if config.pixels == "all" else stages
        self.context = build_context(
            config.context, inputs, dim, bins=config.bins, rates=config.rates
        )
        self.dataset = None
        if config.memory == "off":
            self.classify: nn.Module = nn.Sequential(
                nn.Dropout2d(dropout), nn.Conv2d(dim, num_classes, 1)
            )
            if self.context is not None:
                self.reduce = nn.Identity()  # the context module reads the backbone's map
        else:
            self.classify = Classifier(dim, num_classes, dropout)
            self.dataset = DatasetContext(config, dim, num_classes)
            self._add_context_fusion(dim)
            self._add_codes(num_classes, dim)
        record_batchnorm(self)

    def _add_context_fusion(self, dim: int) -> None:
        if self.context is None:
            return
        if self.config.context_fusion == "attention":
            layers = self.config.transform_layers
            self.context_attention = MapAttention(dim, max(1, dim // 2), layers)
        self.context_fuse = Conv2dNormActivation(2 * dim, dim, 3)

    def _add_codes(self, num_classes: int, dim: int) -> None:
        """The vectors that stand for the classes: M as of the last commit, or a control's."""
        kind = self.config.memory
        is_random = kind in ("random", "learnable")
        codes = torch.randn(num_classes, dim) if is_random else torch.zeros(num_classes, dim)
        if kind == "learnable":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        self.register_buffer("is_set", torch.full((num_classes,), is_random))

    def forward(self, maps: Sequence[Tensor]) -> Outputs:
        """maps: those of the stages, the finest first."""
        auxiliary = tuple(
            head(maps[index]) for head, index in zip(self.auxiliary, self.config.aux_heads)
        )
        if self.config.pixels == "all":
            maps = [torch.cat([upsample(map, maps[0].shape[-2:]) for map in maps], dim=1)]
        if self.down is not None:
            maps = [*maps[:-1], self.down(maps[-1])]
        context = None
        if self.context is not None:
            context = self.context(maps, auxiliary[-1] if auxiliary else None)  # Eq. 3
        if self.dataset is None:
            pixels = self.reduce(maps[-1]) if context is None else context
            return Outputs(pixels, self.classify(pixels), None, auxiliary)
        pixels = self.reduce(maps[-1])
        if context is not None:
            pixels = upsample(pixels, context.shape[-2:])  # UPerNet's is finer
        kind = self.config.memory
        codes = None if kind == "image" else self.codes
        fused, distribution = self.dataset(pixels, codes, self.is_trained)
        if context is not None:
            fused = self._with_context(pixels, fused, context)  # Eq. 4
        return Outputs(pixels, self.classify(fused), distribution, auxiliary)  # Eq. 5

    def _with_context(self, pixels: Tensor, fused: Tensor, context: Tensor) -> Tensor:
        if self.config.context_fusion == "attention":
            context = self.context_attention(pixels, context)
        return self.context_fuse(torch.cat([context, fused], dim=1))

    def consistency_loss(self) -> Tensor:
        """L_M of Eq. 15 and 17: H2 has to tell the classes of M's vectors; 0 before there are any.

        Classes without a vector count in no mean.
        """
        assert isinstance(self.classify, Classifier)
        by_running = self.config.consistency_norm == "running"
        vectors_KC11 = self.codes.detach()[:, :, None, None]
        logits_KK = self.classify(vectors_KC11, by_running_statistics=by_running)[:, :, 0, 0]
        logits_KK = logits_KK.masked_fill(~self.is_trained, -torch.inf)
        classes_K = torch.arange(len(logits_KK), device=logits_KK.device)
        loss_K = F.cross_entropy(logits_KK, classes_K, reduction="none")
        return loss_K.where(self.is_set, 0.0).sum() / self.is_set.sum().clamp_min(1)


def _plain_head(in_dim: int, dim: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        Conv2dNormActivation(in_dim, dim, 3), nn.Dropout2d(dropout), nn.Conv2d(dim, num_classes, 1)
    )
