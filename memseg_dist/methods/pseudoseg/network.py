"""What stands behind the backbone: the decoder, the classifier and the self-attention Grad-CAM.

Shape letters: as in `method`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg_dist.methods.pseudoseg.fusion import fuse
from memseg_dist.methods.pseudoseg.sgc import SelfAttentionCam, class_activation
from memseg_dist.nn.backbone import FeatureStage
from memseg_dist.nn.batchnorm import record_batchnorm
from memseg_dist.nn.deeplab_v3plus import DeepLabV3Plus
from memseg_dist.nn.resize import at_positions, upsample

if TYPE_CHECKING:
    from memseg_dist.methods.pseudoseg.classes import ClassTable
    from memseg_dist.methods.pseudoseg.config import PseudoSegConfig


class Network(nn.Module):
    """trained [T] and foreground [F] are label-space ids; column [K]: where in T a class stands.

    stages: of the finer map, the last but one and the last. classifies: whether there is a
    classifier; attends: whether its activations are refined.
    """

    trained: Tensor
    column: Tensor
    foreground: Tensor

    def __init__(
        self,
        config: PseudoSegConfig,
        stages: Sequence[FeatureStage],
        num_classes: int,
        table: ClassTable,
        *,
        classifies: bool,
        attends: bool,
    ) -> None:
        super().__init__()
        self.config = config
        fine, previous, deep = (stage.dim for stage in stages)
        self.fine_stride, self.deep_stride = stages[0].stride, stages[-1].stride
        self.decoder = DeepLabV3Plus(
            fine, deep, num_classes, rates=config.rates, dim=config.dim, dropout=config.dropout
        )
        self.register_buffer("trained", table.trained, persistent=False)
        self.register_buffer("column", torch.from_numpy(table.in_trained_K), persistent=False)
        self.register_buffer("foreground", table.foreground, persistent=False)
        self.classifier = nn.Linear(deep, num_classes) if classifies else None
        self.attention = None
        if attends:
            self.attention = SelfAttentionCam(
                previous + deep,
                torch.isin(table.trained, table.foreground),
                dim=config.attention_dim,
                affine=config.sgc_affine,
            )
        record_batchnorm(self)

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, K, h, w] of all classes of the label space."""
        return self.decoder(maps[0], maps[-1])

    def classify(self, deep_BDhw: Tensor, valid_Bhw: Tensor, *, dropout: bool) -> Tensor:
        """Logits [B, F] of which classes an image shows, of the mean over its valid positions."""
        assert self.classifier is not None
        counted = valid_Bhw[:, None].to(deep_BDhw.dtype)
        total_BD = (deep_BDhw * counted).sum(dim=(2, 3))
        pooled_BD = total_BD / counted.sum(dim=(2, 3)).clamp_min(1)
        rate = self.config.classifier_dropout
        pooled_BD = F.dropout(pooled_BD, rate, training=dropout and self.training)
        return self.classifier(pooled_BD)[:, self.foreground]

    def shown(self, deep_BDhw: Tensor, valid_Bhw: Tensor) -> Tensor:
        """bool [B, F]: the foreground classes that the classifier sees; without one, none."""
        if self.classifier is None:
            return valid_Bhw.new_zeros(len(valid_Bhw), len(self.foreground))
        logits_BF = self.classify(deep_BDhw, valid_Bhw, dropout=False)
        return logits_BF.sigmoid() >= self.config.shown_from

    def activate(self, deep_BDhw: Tensor, is_shown_BF: Tensor, valid_Bhw: Tensor) -> Tensor:
        """Grad-CAM of the foreground classes, [B, F, h', w'], without gradient."""
        assert self.classifier is not None
        with torch.no_grad():
            weight_FD = self.classifier.weight[self.foreground]
            return class_activation(deep_BDhw, weight_FD, is_shown_BF, valid_Bhw)

    def refine(self, maps: Sequence[Tensor], is_shown_BF: Tensor, valid_Bhw: Tensor) -> Tensor:
        """Eq. 3: logits [B, T, h', w'] of the self-attention Grad-CAM."""
        assert self.attention is not None
        cam_BFhw = self.activate(maps[-1], is_shown_BF, valid_Bhw)
        return self.attention(maps[-1], maps[-2], cam_BFhw, valid_Bhw)

    def label_sources(
        self, maps: Sequence[Tensor], is_shown_BF: Tensor, valid_BHW: Tensor
    ) -> dict[str, Tensor]:
        """Probabilities [B, T, h, w] of the decoder, of the Grad-CAM and of both fused (Eq. 4),
        before they are sharpened. A single source is not divided by r, which brings two of them to
        one scale. Without the attention: of the decoder alone.
        """
        decoder_BThw = self.decode(maps)[:, self.trained]
        found = {"decoder": decoder_BThw.softmax(dim=1)}
        if self.attention is None:
            return found
        refined = self.refine(
            maps, is_shown_BF, at_positions(valid_BHW, maps[-1], self.deep_stride)
        )
        refined_BThw = upsample(refined, decoder_BThw.shape[-2:])
        found["activation"] = refined_BThw.softmax(dim=1)
        found["fused"] = fuse(
            decoder_BThw,
            refined_BThw,
            at_positions(valid_BHW, decoder_BThw, self.fine_stride),
            self.config.gamma,
            self.config.norm_scope,
            self.config.centred,
        )
        return found
