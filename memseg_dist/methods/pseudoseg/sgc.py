"""Self-attention Grad-CAM (Eq. 3, appendix A): class activation, spread to positions that look
alike.

    cam_c = ReLU(w_c . F),  over its maximum,  0 for classes that the image does not show
    attended = softmax(Q K^T / sqrt(d)) cam + cam;  background = 2 - max_c attended_c
    logits = BatchNorm(1 x 1 convolution of [background, attended])

The classifier is linear on the mean of F, so the gradient of its logit by F is w_c / (h w) at every
position: Grad-CAM is this closed form, and no gradient has to be taken.

Shape letters: B images, h x w positions of the deepest map, N = h w, D its channels, F foreground
classes, T all trained ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg_dist.nn.resize import upsample

_NORM_EPS = 1e-3


def class_activation(
    deep_BDhw: Tensor, weight_FD: Tensor, is_shown_BF: Tensor, valid_Bhw: Tensor
) -> Tensor:
    """Grad-CAM of the foreground classes in 0..1, [B, F, h, w]: 0 on padding and for a class that
    `is_shown` denies, else 1 at its maximum (0 everywhere if no position speaks for it).
    """
    cam_BFhw = torch.einsum("bdhw,fd->bfhw", deep_BDhw, weight_FD).relu()
    cam_BFhw = cam_BFhw * is_shown_BF[:, :, None, None] * valid_Bhw[:, None]
    peak_BF11 = cam_BFhw.amax(dim=(2, 3), keepdim=True)
    return cam_BFhw / peak_BF11.where(peak_BF11 > 0, 1.0)


class SelfAttentionCam(nn.Module):
    """Refines class activations by the similarity of positions.

    in_dim: channels of the hypercolumn, the last two maps of the backbone together. is_foreground:
    bool [T], all True where there is no background. dim: d, of keys and queries.
    """

    order: Tensor

    def __init__(
        self, in_dim: int, is_foreground_T: Tensor, dim: int = 128, affine: bool = False
    ) -> None:
        super().__init__()
        num_classes = len(is_foreground_T)
        self.query = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.key = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.mix = nn.Conv2d(num_classes, num_classes, 1, bias=False)
        for layer in (self.query, self.key, self.mix):
            nn.init.xavier_uniform_(layer.weight)
        self.shift = nn.Parameter(torch.zeros(num_classes))
        self.scale = nn.Parameter(torch.ones(num_classes)) if affine else None
        self.has_background = not bool(is_foreground_T.all())
        # brings [background, foreground classes] to the order of T
        order = is_foreground_T.int().argsort(stable=True).argsort()
        self.register_buffer("order", order, persistent=False)

    def forward(
        self, deep_BDhw: Tensor, previous: Tensor, cam_BFhw: Tensor, valid_Bhw: Tensor
    ) -> Tensor:
        """Logits [B, T, h, w]. Only query, key, mix and shift learn: gradients go neither to the
        maps of the backbone nor to the activations.

        previous: the map of the stage before, of any size.
        """
        previous_Bchw = upsample(previous.detach(), deep_BDhw.shape[-2:])
        hypercolumn = torch.cat([deep_BDhw.detach(), previous_Bchw], dim=1)
        scores_BFhw = self._attended(hypercolumn, cam_BFhw.detach(), valid_Bhw)
        if self.has_background:
            background = 2 - scores_BFhw.amax(dim=1, keepdim=True)
            scores_BFhw = torch.cat([background, scores_BFhw], dim=1)
        return self._normalised(self.mix(scores_BFhw[:, self.order]), valid_Bhw)

    def _attended(self, hypercolumn: Tensor, cam_BFhw: Tensor, valid_Bhw: Tensor) -> Tensor:
        """Each position's activations and, added, those of the positions like it: in 0..2."""
        query_BNd, key_BNd, value_BNF = (
            map.flatten(2).mT.contiguous()
            for map in (self.query(hypercolumn), self.key(hypercolumn), cam_BFhw)
        )
        is_key_BN = valid_Bhw.flatten(1)
        is_key_BN = is_key_BN | ~is_key_BN.any(dim=1, keepdim=True)  # of a blank image: all
        attended_BNF = F.scaled_dot_product_attention(
            query_BNd[:, None], key_BNd[:, None], value_BNF[:, None],
            attn_mask=is_key_BN[:, None, None],
        )[:, 0]  # fmt: skip
        return attended_BNF.mT.unflatten(2, cam_BFhw.shape[-2:]) + cam_BFhw

    def _normalised(self, scores_BThw: Tensor, valid_Bhw: Tensor) -> Tensor:
        """BatchNorm by the valid positions of this batch, whatever the mode; see deviation 5."""
        counted = valid_Bhw[:, None].float()
        count = counted.sum().clamp_min(1)
        axes = (0, 2, 3)
        mean = (scores_BThw * counted).sum(dim=axes, keepdim=True) / count
        centred = scores_BThw - mean
        variance = (centred.square() * counted).sum(dim=axes, keepdim=True) / count
        normalised = centred * (variance + _NORM_EPS).rsqrt()
        if self.scale is not None:
            normalised = normalised * self.scale[:, None, None]
        return normalised + self.shift[:, None, None]
