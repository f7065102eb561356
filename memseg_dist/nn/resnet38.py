"""ResNet38: the wide pre-activation residual net of "Wider or Deeper" (Wu, Shen, van den Hengel).

The backbone of most weakly supervised papers since AffinityNet. Its output stride is 8: three
stages halve the size, the later ones are dilated. The ImageNet weights that those papers start from
(ilsvrc-cls_rna-a1_cls1000_ep-0001.params) are an MXNet file, and there is no converter for it here:
`pretrained` takes a .safetensors file with the names of this module.

    conv1  3 x 3                3 ->   64
    b2     3 wide blocks       64 ->  128, stride 2
    b3     3 wide blocks      128 ->  256, stride 2
    b4     6 wide blocks      256 ->  512, stride 2
    b5     3 wide blocks      512 -> 1024, inner width 512, dilation 2
    b6     1 bottleneck      1024 -> 2048, dilation 4, dropout 0.3
    b7     1 bottleneck      2048 -> 4096, dilation 4, dropout 0.5
    norm, ReLU

Decisions where our sources are silent: the first convolution of b5 is not dilated (its input has no
gaps yet), a bottleneck's inner widths are a quarter and a half of its output, dropout zeroes whole
channels before its second and third convolutions.

Shape letters: B images, H x W pixels, h x w positions, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class WideBlock(nn.Module):
    """Norm, ReLU, 3 x 3, norm, ReLU, 3 x 3, beside a shortcut.

    The shortcut is the input where shapes agree, else a 1 x 1 of the normalised input.
    """

    def __init__(
        self,
        in_dim: int,
        inner: int,
        dim: int,
        stride: int = 1,
        dilations: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        first, second = dilations
        self.norm1 = nn.BatchNorm2d(in_dim)
        self.conv1 = nn.Conv2d(in_dim, inner, 3, stride, padding=first, dilation=first, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, dim, 3, padding=second, dilation=second, bias=False)
        is_same = in_dim == dim and stride == 1
        self.shortcut = None if is_same else nn.Conv2d(in_dim, dim, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(normed)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(normed))))


class Bottleneck(nn.Module):
    """Norm, ReLU, 1 x 1, then twice norm, ReLU, dropout and a convolution; shortcut a 1 x 1."""

    def __init__(self, in_dim: int, dim: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_dim)
        self.conv1 = nn.Conv2d(in_dim, dim // 4, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(dim // 4)
        self.conv2 = nn.Conv2d(
            dim // 4, dim // 2, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.norm3 = nn.BatchNorm2d(dim // 2)
        self.conv3 = nn.Conv2d(dim // 2, dim, 1, bias=False)
        self.shortcut = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.relu(self.norm1(x))
        inner = self.dropout(F.relu(self.norm2(self.conv1(normed))))
        inner = self.dropout(F.relu(self.norm3(self.conv2(inner))))
        return self.shortcut(normed) + self.conv3(inner)


class ResNet38(nn.Module):
    """Pixels [B, 3, H, W] to a list of maps [B, D, h, w]: of b2 to b7, which are stages 0 to 5.

    Of b7, D = 4096 width, and it has gone through the last norm and ReLU; the others are the sums
    that the next block takes. out_indices: ascending, from 0.

    frozen: every norm keeps its statistics and weights and conv1 and b2 keep theirs, whatever
    `train()` says; what a pretrained net is fine-tuned with. ValueError for an output stride other
    than 8 or a width that leaves a part of a channel.
    """

    def __init__(
        self,
        output_stride: int = 8,
        width: float = 1.0,
        frozen: bool = False,
        out_indices: Sequence[int] = (5,),
    ) -> None:
        super().__init__()
        if output_stride != 8:
            raise ValueError(f"backbone.output_stride of resnet38 is {output_stride}; it must be 8")
        if width <= 0 or 64 * width % 1:
            raise ValueError(f"option width of resnet38 is {width}; it must be a multiple of 1/64")
        c64, c128, c256, c512, c1024, c2048, c4096 = (int(64 * width) << n for n in range(7))
        self.frozen = frozen
        stages = zip((c128, c256, c512, c1024, c2048, c4096), (2, 4, 8, 8, 8, 8))
        info = [
            {"num_chs": dim, "reduction": stride, "module": f"b{number}"}
            for number, (dim, stride) in enumerate(stages, start=2)
        ]
        self.feature_info = FeatureInfo(info, tuple(out_indices))
        self.conv1 = nn.Conv2d(3, c64, 3, padding=1, bias=False)
        self.b2 = _wide_stage(3, c64, c128, c128, stride=2)
        self.b3 = _wide_stage(3, c128, c256, c256, stride=2)
        self.b4 = _wide_stage(6, c256, c512, c512, stride=2)
        self.b5 = _wide_stage(3, c512, c512, c1024, dilation=2)
        self.b6 = Bottleneck(c1024, c2048, dilation=4, dropout=0.3)
        self.b7 = Bottleneck(c2048, c4096, dilation=4, dropout=0.5)
        self.norm = nn.BatchNorm2d(c4096)
        self._is_checkpointing = False
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if frozen:
            for module in (self.conv1, self.b2, *self._norms()):
                module.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.conv1(x)
        maps = []
        for index, stage in enumerate((self.b2, self.b3, self.b4, self.b5, self.b6, self.b7)):
            if self._is_checkpointing and self.training:
                x = checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
            if index in self.feature_info.out_indices:
                maps.append(F.relu(self.norm(x)) if stage is self.b7 else x)
        return maps

    def train(self, mode: bool = True) -> ResNet38:
        super().train(mode)
        if self.frozen:
            for norm in self._norms():
                norm.eval()
        return self

    def set_grad_checkpointing(self, enabled: bool) -> None:
        self._is_checkpointing = enabled

    def _norms(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, _BatchNorm))


def _wide_stage(
    num_blocks: int, in_dim: int, inner: int, dim: int, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    first = WideBlock(in_dim, inner, dim, stride, dilations=(1, dilation))
    others = (WideBlock(dim, inner, dim, 1, (dilation, dilation)) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *others)
