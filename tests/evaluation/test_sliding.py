"""Chunked argmax = dense argmax, in any mode, at any chunk size, with ties."""

from __future__ import annotations

import pytest
import torch
from reference.sliding import dense_logits, segment_dense
from torch import Tensor

from memseg_dist.evaluation import sliding
from memseg_dist.evaluation.sliding import Inference, Window, segment, segment_confident, windows
from memseg_dist.methods.method import DenseLogits, LinearLogits

STRIDE = 4
DIM = 6


def integer_predict(weight: Tensor, bias: Tensor | None = None):
    """A backbone of small integers: every product and every bilinear blend by 4 is exact."""

    def predict(images: Tensor, classes: Tensor) -> LinearLogits:
        height, width = (-(-length // STRIDE) for length in images.shape[-2:])
        padded = torch.zeros(1, 3, height * STRIDE, width * STRIDE)
        padded[..., : images.shape[-2], : images.shape[-1]] = images
        corners = padded[..., ::STRIDE, ::STRIDE]
        features = torch.cat([corners % 8, corners // 32], dim=1)
        chosen = None if bias is None else bias[classes]
        return LinearLogits(features, weight[classes], chosen)

    return predict


def picture(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def integer_weight(num_classes: int, low: int = -3, high: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(num_classes)
    return torch.randint(low, high, (num_classes, DIM), generator=generator).float()


def test_windows_cover_and_shift_the_last_one_inward():
    found = windows((10, 7), window=4, stride=3)
    assert sorted({part.top for part in found}) == [0, 3, 6]
    assert sorted({part.left for part in found}) == [0, 3]
    assert all(part.size == (4, 4) for part in found)
    seen = torch.zeros(10, 7)
    for part in found:
        seen[part.top : part.bottom, part.left : part.right] += 1
    assert seen.min() >= 1
    assert windows((3, 9), 4, 4) == [Window(0, 0, 3, 4), Window(0, 4, 3, 8), Window(0, 5, 3, 9)]
    assert windows((4, 8), 4, 4) == [Window(0, 0, 4, 4), Window(0, 4, 4, 8)]


def test_windows_refuse_gaps():
    with pytest.raises(ValueError, match="stride 5 with window 4"):
        windows((10, 10), 4, 5)


@pytest.mark.parametrize("memory_bytes", [1, 40_000, 10**9])
@pytest.mark.parametrize(
    ("size", "mode", "window", "stride", "out_size"),
    [
        ((32, 48), "whole", 0, 0, None),
        ((32, 48), "slide", 16, 8, None),
        ((24, 40), "slide", 16, 16, (48, 80)),
        ((12, 8), "slide", 16, 16, None),  # smaller than the window
        ((29, 43), "whole", 0, 0, (37, 21)),  # odd: padded features are cropped
        ((29, 43), "slide", 16, 9, (51, 70)),
    ],
)
@pytest.mark.parametrize("num_classes", [1, 5, 300])
def test_chunked_equals_dense(size, mode, window, stride, out_size, memory_bytes, num_classes):
    weight = integer_weight(num_classes)
    predict = integer_predict(weight, torch.arange(num_classes).float() % 3)
    classes = torch.arange(num_classes)
    options = Inference(mode, window=window, stride=stride, memory_bytes=memory_bytes)
    image = picture(*size)
    fast = segment(predict, image, classes, options, out_size)
    slow = segment_dense(predict, image, classes, options, out_size)
    assert fast.shape == (out_size or size) and fast.dtype == torch.int64
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 256])
def test_equal_classes_tie_and_the_first_wins(monkeypatch, chunk):
    """Real-valued weights, each held by several classes far apart: no copy ever wins."""
    monkeypatch.setattr(sliding, "_chunk_size", lambda *_: chunk)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(150, 33, generator=generator).repeat(4, 1)
    features = torch.randn(1, 33, 9, 7, generator=generator)
    image = picture(36, 25)
    for mode in ("whole", "slide"):
        label = segment(
            lambda images, classes: LinearLogits(
                features[..., : -(-images.shape[-2] // 4), : -(-images.shape[-1] // 4)], weight
            ),
            image,
            torch.arange(600),
            Inference(mode, window=20, stride=12),
            out_size=(50, 40),
        )
        assert label.max() < 150


def test_equal_logits_give_the_first_class():
    weight = torch.ones(700, DIM)
    options = Inference("whole", memory_bytes=1)
    label = segment(integer_predict(weight), picture(8, 8), torch.arange(700), options)
    assert torch.equal(label, torch.zeros(8, 8, dtype=torch.int64))


def test_all_logits_far_below_zero():
    weight = -1000 * torch.ones(3, DIM) * torch.tensor([[3.0], [1.0], [2.0]])
    label = segment(integer_predict(weight), picture(8, 8) | 1, torch.arange(3))
    assert torch.equal(label, torch.ones(8, 8, dtype=torch.int64))


def test_only_the_classes_asked_for():
    weight = integer_weight(20)
    classes = torch.tensor([17, 3, 11])
    label = segment(integer_predict(weight), picture(16, 16), classes)
    alone = segment(lambda images, _: integer_predict(weight[classes])(images, torch.arange(3)),
                    picture(16, 16), torch.arange(3))  # fmt: skip
    assert torch.equal(label, alone) and label.max() < 3


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    """The largest full-size tensor stays under the bound, for 10 or 5,000 classes."""
    largest = 0
    inner = sliding._full_resolution

    def watched(*args):
        nonlocal largest
        result = inner(*args)
        largest = max(largest, result.numel() * result.element_size())
        return result

    monkeypatch.setattr(sliding, "_full_resolution", watched)
    weight = integer_weight(5000)
    bound = 2 * 2**20
    for num_classes in (10, 5000):
        segment(
            integer_predict(weight),
            picture(64, 64),
            torch.arange(num_classes),
            Inference("whole", memory_bytes=bound),
            out_size=(128, 96),
        )
        assert largest <= bound


@pytest.mark.parametrize(
    ("image", "classes", "mode", "message"),
    [
        (torch.zeros(3, 8, 8), torch.arange(2), "whole", "uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.arange(0), "whole", "empty"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.arange(2), "tiles", "'tiles'"),
    ],
)
def test_bad_input_is_named(image, classes, mode, message):
    with pytest.raises(ValueError, match=message):
        segment(integer_predict(integer_weight(2)), image, classes, Inference(mode))


def test_autocast_does_not_round_the_logits():
    generator = torch.Generator().manual_seed(0)
    weight, features = torch.randn(400, 64, generator=generator), torch.randn(1, 64, 6, 6)

    def predict(images: Tensor, classes: Tensor) -> LinearLogits:
        return LinearLogits(features, weight[classes])

    plain = segment(predict, picture(24, 24), torch.arange(400))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(segment(predict, picture(24, 24), torch.arange(400)), plain)


@pytest.mark.parametrize("memory_bytes", [1, 10**9])
@pytest.mark.parametrize("kind", ["linear", "dense"])
def test_confidence_is_the_softmax_of_the_dense_logits(memory_bytes, kind):
    weight = integer_weight(600) / 40
    linear = integer_predict(weight, torch.arange(600).float() / 600)

    def predict(images: Tensor, classes: Tensor) -> LinearLogits | DenseLogits:
        made = linear(images, classes)
        return made if kind == "linear" else DenseLogits(made.dense())

    image, classes = picture(24, 40), torch.arange(600)
    options = Inference(window=16, stride=12, memory_bytes=memory_bytes)
    label, confidence = segment_confident(predict, image, classes, options, (30, 50))
    expected = dense_logits(predict, image, classes, options, (30, 50)).softmax(dim=0)
    torch.testing.assert_close(confidence, expected.amax(dim=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(expected.gather(0, label[None])[0], confidence, rtol=1e-4, atol=0)
    assert torch.equal(label, segment(predict, image, classes, options, (30, 50)))
