"""g of Eq. 3: the branch of the second task, which shares the first blocks of f.

f has N blocks: those of the backbone, and the head.

    stage 2    f  ...  conv4 - conv5 - head          g shares N - 2: all before conv5, and has
                            `- own   - own head      three bottlenecks of half conv5's width
    stage 3    f  ...  conv4 - conv5 - head          g shares N - 1: all before the head
                                    `- own head

Shape letters: B images, h x w positions, D channels, K classes asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from memseg_dist.nn.backbone import FeatureStage
from memseg_dist.nn.batchnorm import record_batchnorm
from memseg_dist.nn.deeplab import DeepLabV2Head

NUM_BOTTLENECKS = 3


class Branch(nn.Module):
    """stages: the backbone's last two. Not used once training is over."""

    def __init__(
        self,
        stage: int,
        stages: Sequence[FeatureStage],
        num_classes: int,
        rates: Sequence[int],
        dilation: int | None = None,
    ) -> None:
        super().__init__()
        before, last = stages
        self.own: nn.Module | None = None
        dim = last.dim
        if stage == 2:
            planes = max(1, last.dim // 8)
            dim = Bottleneck.expansion * planes
            dilation = dilation or max(1, 32 // last.stride)
            self.own = bottlenecks(before.dim, planes, last.stride // before.stride, dilation)
        self.head = DeepLabV2Head(dim, num_classes, rates)
        record_batchnorm(self)

    def forward(self, maps: Sequence[Tensor], class_ids_K: Tensor) -> Tensor:
        """Logits [B, K, h, w] from the maps of the backbone's last two stages."""
        features_BDhw = maps[-1] if self.own is None else self.own(maps[-2])
        return self.head(features_BDhw, class_ids_K)


def bottlenecks(in_dim: int, planes: int, stride: int, dilation: int) -> nn.Sequential:
    """A ResNet's stage with random weights: Kaiming's, with BatchNorm that is trained."""
    out_dim = Bottleneck.expansion * planes
    shortcut = nn.Sequential(
        nn.Conv2d(in_dim, out_dim, 1, stride, bias=False), nn.BatchNorm2d(out_dim)
    )
    first = Bottleneck(in_dim, planes, stride, shortcut, dilation=dilation)
    others = [Bottleneck(out_dim, planes, dilation=dilation) for _ in range(NUM_BOTTLENECKS - 1)]
    stage = nn.Sequential(first, *others)
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stage
