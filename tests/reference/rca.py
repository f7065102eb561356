"""RCA as the paper has it, computed the long way: the yardstick of the tests.

One process, the whole global batch at once, loops over images, classes, positions and rows. Nothing
here is used in training.

Shape letters: D channels, h x w positions, L classes, P prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Key = tuple[int, int]
"""(class, image)."""


def region_vector(features_Dhw: Tensor, map_hw: Tensor, valid_hw: Tensor) -> Tensor:
    """Eq. 2."""
    height, width = map_hw.shape
    places = [(y, x) for y in range(height) for x in range(width) if valid_hw[y, x]]
    mean = sum(map_hw[y, x].item() for y, x in places) / len(places)
    inside = [(y, x) for y, x in places if map_hw[y, x].item() > mean] or places
    return sum((features_Dhw[:, y, x] for y, x in inside), 0 * features_Dhw[:, 0, 0]) / len(inside)


def remember(memory: dict[Key, Tensor], key: Key, vector: Tensor, momentum: float) -> None:
    """Eq. 3; the first write copies."""
    vector = vector.detach().clone()
    if key in memory:
        vector = momentum * memory[key] + (1 - momentum) * vector
    memory[key] = vector


def nce(query_D: Tensor, class_id: int, memory: dict[Key, Tensor], temperature: float) -> Tensor:
    """Eq. 4; 0 for a class that is not in the memory."""
    similar = {
        key: torch.exp(F.cosine_similarity(query_D, row, dim=0) / temperature)
        for key, row in memory.items()
    }
    positives = [value for key, value in similar.items() if key[0] == class_id]
    negatives = sum((v for key, v in similar.items() if key[0] != class_id), query_D.sum() * 0)
    terms = [-torch.log(value / (value + negatives)) for value in positives]
    return sum(terms, query_D.sum() * 0) / max(len(terms), 1)


def mixed_nce(
    own: Tensor,
    own_class: int,
    other: Tensor,
    other_class: int,
    omega: float,
    memory: dict[Key, Tensor],
    temperature: float,
) -> Tensor:
    """Eq. 5, 6."""
    mixed = omega * own + (1 - omega) * other
    return omega * nce(mixed, own_class, memory, temperature) + (1 - omega) * nce(
        mixed, other_class, memory, temperature
    )


def aggregated(features_Dhw: Tensor, prototypes_PD: Tensor, scale: float) -> Tensor:
    """Eq. 7 - 9: [2 D, h, w]."""
    dim, height, width = features_Dhw.shape
    columns = []
    for y in range(height):
        for x in range(width):
            feature = features_Dhw[:, y, x]
            read = torch.zeros_like(feature)
            if len(prototypes_PD):
                products = torch.stack([scale * feature @ row for row in prototypes_PD])
                for share, row in zip(products.softmax(dim=0), prototypes_PD):
                    read = read + share * row
            columns.append(torch.cat([feature, read]))
    return torch.stack(columns, dim=1).reshape(2 * dim, height, width)


def label_loss(map_Lhw: Tensor, valid_hw: Tensor, present: set[int]) -> Tensor:
    """LCE(GAP(map), y): mean over the classes of the binary cross-entropy."""
    losses = []
    for class_id in range(len(map_Lhw)):
        score = map_Lhw[class_id][valid_hw].mean()
        probability = torch.sigmoid(score)
        losses.append(-torch.log(probability if class_id in present else 1 - probability))
    return torch.stack(losses).mean()


def linearly_aggregated(features_Dhw: Tensor, prototypes_PD: Tensor, module) -> Tensor:
    """The code's aggregation: A = 2 q k^T, no softmax; [D, h, w]."""
    query = F.conv2d(features_Dhw[None], module.query.weight, module.query.bias)[0]
    key, value = module.key(prototypes_PD), module.value(prototypes_PD)
    read = torch.zeros_like(query)
    for row in range(len(prototypes_PD)):
        weight_hw = 2 * torch.einsum("dhw,d->hw", query, key[row])
        read = read + weight_hw * value[row][:, None, None]
    read = F.conv2d(read[None], module.output.weight, module.output.bias)[0]
    both = torch.cat([features_Dhw, read])[None]
    return F.conv2d(both, module.concat.weight, module.concat.bias)[0]
