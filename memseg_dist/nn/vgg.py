"""VGG16 as a feature map: the thirteen convolutions, without the classifier.

Simonyan and Zisserman 2015, in the form that RCA and OAA train: at output stride 8 the fourth pool
keeps its size, the last three convolutions are dilated by 2 instead, and there is no fifth pool.
Layers are numbered as in torchvision and timm, so their weights fit at any output stride.

Shape letters: B images, H x W pixels, h x w positions, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and number of 3 x 3 convolutions before each pool."""


class Vgg16(nn.Module):
    """Pixels [B, 3, H, W] to a list of maps [B, D, h, w], each after a stage's last ReLU or pool.

    The five stages end with the pools; of the last, D = 512 width. out_indices: ascending, from 0.
    output_stride 8: see above. 16: four plain pools. 32: all five. ValueError for any other, or a
    width that leaves a part of a channel.
    """

    def __init__(
        self, output_stride: int = 32, width: float = 1.0, out_indices: Sequence[int] = (4,)
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"backbone.output_stride of vgg16 is {output_stride}; use 8, 16 or 32")
        if width <= 0 or 64 * width % 1:
            raise ValueError(f"option width of vgg16 is {width}; it must be a multiple of 1/64")
        info = [
            {"num_chs": int(dim * width), "reduction": min(2**n, output_stride), "module": f"{n}"}
            for n, (dim, _) in enumerate(STAGES, start=1)
        ]
        self.feature_info = FeatureInfo(info, tuple(out_indices))
        layers: list[nn.Module] = []
        self._starts = [0]
        in_channels = 3
        for number, (channels, num_convolutions) in enumerate(STAGES, start=1):
            dilation = 2 if number == 5 and output_stride == 8 else 1
            for _ in range(num_convolutions):
                out_channels = int(channels * width)
                layers += [
                    nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation),
                    nn.ReLU(inplace=True),
                ]
                in_channels = out_channels
            if number == 4 and output_stride == 8:
                layers.append(nn.MaxPool2d(3, stride=1, padding=1))
            elif number < 5 or output_stride == 32:
                layers.append(nn.MaxPool2d(2))
            self._starts.append(len(layers))
        self.features = nn.Sequential(*layers)
        self._is_checkpointing = False
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for index, (start, stop) in enumerate(zip(self._starts, self._starts[1:])):
            stage = self.features[start:stop]
            if self._is_checkpointing and self.training:
                x = checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
            if index in self.feature_info.out_indices:
                maps.append(x)
        return maps

    def set_grad_checkpointing(self, enabled: bool) -> None:
        self._is_checkpointing = enabled
