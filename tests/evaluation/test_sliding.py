"""Chunked argmax = dense argmax, in any mode, at any chunk size, with ties."""

from __future__ import annotations

import weakref

import pytest
import torch
from reference.sliding import dense_logits, dense_scores, segment_dense
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memseg_dist.config import ValidationConfig
from memseg_dist.data.augment import resize_image
from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.evaluation import sliding
from memseg_dist.evaluation.sliding import (
    Inference,
    Window,
    segment,
    segment_batch,
    segment_confident,
    windows,
)
from memseg_dist.methods.method import DenseLogits, LinearLogits
from memseg_dist.nn.densecrf import CrfConfig, dense_crf

STRIDE = 4
DIM = 6


def integer_predict(weight: Tensor, bias: Tensor | None = None):
    """A backbone of small integers: every product and every bilinear blend by 4 is exact."""

    def predict(images: Tensor, classes: Tensor) -> LinearLogits:
        height, width = (-(-length // STRIDE) for length in images.shape[-2:])
        padded = torch.zeros(len(images), 3, height * STRIDE, width * STRIDE)
        padded[..., : images.shape[-2], : images.shape[-1]] = images
        corners = padded[..., ::STRIDE, ::STRIDE]
        features = torch.cat([corners % 8, corners // 32], dim=1)
        chosen = None if bias is None else bias[classes]
        return LinearLogits(features, weight[classes], chosen, stride=STRIDE)

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


def test_rectangular_windows():
    found = windows((6, 10), (4, 8), (2, 8))
    assert found == [
        Window(top, left, top + 4, left + 8) for top in (0, 2) for left in (0, 2)
    ]  # fmt: skip
    assert windows((3, 9), (4, 4), (4, 4)) == windows((3, 9), 4, 4)
    assert windows((4, 6), (8, 3), (8, 3)) == [Window(0, 0, 4, 3), Window(0, 3, 4, 6)]
    image = picture(24, 40)
    weight = integer_weight(7)
    predict = integer_predict(weight, torch.zeros(7))
    options = Inference("slide", window=(8, 16), stride=(8, 12))
    found = segment(predict, image, torch.arange(7), options)
    assert torch.equal(found, segment_dense(predict, image, torch.arange(7), options, None))


def test_windows_refuse_gaps():
    with pytest.raises(ValueError, match="stride 5 with window 4"):
        windows((10, 10), 4, 5)
    with pytest.raises(ValueError, match=r"stride \(4, 5\) with window \(8, 4\)"):
        windows((10, 10), (8, 4), (4, 5))
    with pytest.raises(ValueError, match=r"stride 4 with window \(8, 3\)"):
        windows((10, 10), (8, 3), 4)


@pytest.mark.parametrize("memory_bytes", [1, 40_000, 10**9])
@pytest.mark.parametrize(
    ("size", "mode", "window", "stride", "out_size"),
    [
        ((32, 48), "whole", 16, 16, None),
        ((32, 48), "slide", 16, 8, None),
        ((24, 40), "slide", 16, 16, (48, 80)),
        ((12, 8), "slide", 16, 16, None),  # smaller than the window
        ((29, 43), "whole", 16, 16, (37, 21)),  # odd: padded features are cropped
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
                features[..., : -(-images.shape[-2] // 4), : -(-images.shape[-1] // 4)],
                weight,
                stride=4,
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


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_batch_equals_its_images_one_by_one(mode):
    weight, classes = integer_weight(20), torch.arange(20)
    options = Inference(mode, window=16, stride=12, scales=(1.0, 1.5), flip=True, swap=((3, 5),))
    images = torch.stack([picture(24, 36), picture(24, 36).flip(-1) // 2])
    sizes, predict = [(30, 40), (24, 36)], integer_predict(weight)
    found = segment_batch(predict, images, classes, options, sizes)
    for image, size, label in zip(images, sizes, found, strict=True):
        assert torch.equal(label, segment(predict, image, classes, options, size))
    assert not torch.equal(found[0][:24, :36], found[1])


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
        return LinearLogits(features, weight[classes], stride=4)

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
        return made if kind == "linear" else DenseLogits(made.dense(), made.stride)

    image, classes = picture(24, 40), torch.arange(600)
    options = Inference(window=16, stride=12, memory_bytes=memory_bytes)
    label, confidence = segment_confident(predict, image, classes, options, (30, 50))
    expected = dense_logits(predict, image, classes, options, (30, 50)).softmax(dim=0)
    torch.testing.assert_close(confidence, expected.amax(dim=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(expected.gather(0, label[None])[0], confidence, rtol=1e-4, atol=0)
    assert torch.equal(label, segment(predict, image, classes, options, (30, 50)))


VIEWS = [
    {"scales": (0.5, 1.0, 1.75)},
    {"flip": True},
    {"scales": (1.5,), "flip": True},
    {"scales": (0.75, 1.25), "flip": True, "swap": ((0, 4), (3, 1))},
]


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize(
    ("size", "mode", "out_size", "num_classes", "memory_bytes"),
    [
        ((32, 48), "whole", None, 5, 10**6),
        ((29, 43), "slide", (51, 70), 5, 1),  # odd: padded features are cropped
        ((13, 18), "whole", (20, 11), 270, 10**6),
    ],
)
def test_views_are_enlarged_and_averaged(
    size, mode, out_size, num_classes, views, average, memory_bytes
):
    predict = integer_predict(integer_weight(num_classes) / 16, torch.arange(num_classes) % 3 / 4)
    classes = torch.arange(num_classes)
    options = Inference(
        mode, window=16, stride=9, average=average, memory_bytes=memory_bytes, **views
    )
    image = picture(*size)
    label = segment(predict, image, classes, options, out_size)
    scores = dense_scores(predict, image, classes, options, out_size)
    chosen = scores.gather(0, label[None])[0]
    assert label.shape == (out_size or size)
    torch.testing.assert_close(chosen, scores.amax(dim=0), rtol=1e-5, atol=1e-6)
    again, confidence = segment_confident(predict, image, classes, options, out_size)
    assert torch.equal(again, label)
    shares = scores if average == "probabilities" else scores.softmax(dim=0)
    torch.testing.assert_close(confidence, shares.gather(0, label[None])[0], rtol=1e-4, atol=1e-6)


def by_column(images: Tensor, classes: Tensor) -> DenseLogits:
    """Class 7 is found at the right, 3 at the left, 5 nowhere; each more than half a pixel off."""
    columns = torch.arange(images.shape[-1]) - (images.shape[-1] - 1) / 2
    columns = columns.expand(1, 1, *images.shape[-2:])
    weight = torch.tensor([0.0, 0.0, 0.0, -1.0, 0.0, -1000.0, 0.0, 1.0])
    return DenseLogits(columns.abs() * 0 + columns * weight[classes].view(1, -1, 1, 1), stride=1)


def test_a_mirrored_view_is_turned_back():
    """Left is not mirrored alone: the mean over both views is symmetric, and by its own columns."""
    image, classes = picture(6, 10), torch.tensor([7, 3])
    plain = segment(by_column, image, classes)
    assert (plain[:, :5] == 1).all() and (plain[:, 5:] == 0).all()

    def brightest(images: Tensor, asked: Tensor) -> DenseLogits:
        bright = images[:, :1].float()
        return DenseLogits(torch.cat([bright, 100 - bright], dim=1), stride=1)

    image[0] = torch.arange(60).view(6, 10) * 4
    for flip in (False, True):  # what depends on the pixel alone does not see the mirror
        label = segment(brightest, image, classes, Inference(flip=flip))
        assert torch.equal(label, (image[0] < 50).long())
    probabilities, logits = (
        segment_confident(by_column, image, classes, Inference(flip=True, average=average))[1]
        for average in ("probabilities", "logits")
    )
    for confidence in (probabilities, logits):  # without a swap the two views cancel
        torch.testing.assert_close(confidence, torch.full((6, 10), 0.5))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_left_and_right_change_places_in_the_mirror(average):
    image, classes = picture(6, 10), torch.tensor([7, 3])
    options = Inference(flip=True, swap=((3, 7),), average=average)
    label, confidence = segment_confident(by_column, image, classes, options)
    expected, alone = segment_confident(by_column, image, classes)
    assert torch.equal(label, expected)
    torch.testing.assert_close(confidence, alone)


def test_a_mirror_is_asked_for_the_other_class_even_if_that_does_not_compete():
    asked = []

    def watched(images: Tensor, classes: Tensor) -> DenseLogits:
        asked.append(classes.tolist())
        return by_column(images, classes)

    options = Inference("whole", flip=True, swap=((7, 3),), scales=(1.0, 2.0))
    label = segment(watched, picture(6, 10), torch.tensor([7, 5]), options)
    assert asked == [[7, 5], [3, 5]] * 2
    plain = segment(by_column, picture(6, 10), torch.tensor([7, 5]))
    assert torch.equal(label, plain) and plain.unique().tolist() == [0, 1]


def test_windows_are_cut_from_each_size():
    shapes = []

    def watched(images: Tensor, classes: Tensor) -> LinearLogits:
        shapes.append(tuple(images.shape[-2:]))
        return integer_predict(integer_weight(3))(images, classes)

    options = Inference(window=16, stride=16, scales=(0.5, 1.0, 2.0))
    segment(watched, picture(16, 24), torch.arange(3), options)
    assert shapes == [(8, 12), *[(16, 16)] * 2, *[(16, 16)] * 6]
    shapes.clear()
    segment(watched, picture(3, 15), torch.arange(3), Inference("whole", scales=(0.1, 1.5)))
    assert shapes == [(1, 2), (5, 23)]


def test_views_share_the_class_vectors():
    weight, kept = integer_weight(4), set()
    inner = sliding._views

    def watched(*arguments):
        views = inner(*arguments)
        kept.update(part.weight.data_ptr() for view in views for part in view.predictions)
        return views

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliding, "_views", watched)
        options = {"flip": True, "scales": (1.0, 1.5), "window": 16, "stride": 16}
        segment(integer_predict(weight), picture(24, 24), torch.arange(4), Inference(**options))
        assert len(kept) == 1
        kept.clear()
        swapping = Inference(**options, swap=((0, 1),))
        segment(integer_predict(weight), picture(24, 24), torch.arange(4), swapping)
        assert len(kept) == 2


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, made since this mode began."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.tensors = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.tensors += [
            weakref.ref(leaf) for leaf in tree_leaves(made) if isinstance(leaf, Tensor)
        ]
        self.tensors = [tensor for tensor in self.tensors if tensor() is not None]
        storages = {
            storage.data_ptr(): storage.nbytes()
            for storage in (tensor().untyped_storage() for tensor in self.tensors)
        }
        self.peak = max(self.peak, sum(storages.values()))
        return made


@pytest.mark.parametrize(
    ("average", "mode", "scales", "out_size"),
    [
        ("probabilities", "whole", (0.5, 1.0, 1.5), (64, 48)),
        ("logits", "slide", (0.5, 1.0, 1.5), (48, 32)),
        ("logits", "whole", (1.0,), (48, 32)),
    ],
)
def test_views_keep_to_the_memory(average, mode, scales, out_size):
    weight, bound = integer_weight(300), 3 * 2**20
    options = Inference(
        mode, window=32, stride=16, scales=scales, flip=True, average=average,
        memory_bytes=bound,
    )  # fmt: skip
    with torch.no_grad(), LiveBytes() as live:
        segment(integer_predict(weight), picture(48, 32), torch.arange(300), options, out_size)
    num_views, (height, width) = 2 * len(scales), out_size
    maps = (4 + 8 + 4 + 4 * num_views) * height * width  # best, label, sums
    windows = [
        part
        for scale in options.scales
        for part in sliding.image_windows((int(48 * scale), int(32 * scale)), options)
    ]
    features = 2 * sum(4 * DIM * part.size[0] * part.size[1] // STRIDE**2 for part in windows)
    others = 4 * sum(int(48 * scale) * int(32 * scale) * 2 for scale in options.scales)
    vectors = 2 * weight.numel() * 4
    assert bound / 4 < live.peak < bound + maps + features + others + vectors


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("out_size", [None, (30, 44)])
def test_a_crf_sharpens_the_averaged_probabilities_at_the_size_of_the_result(average, out_size):
    """The slow twin: all dense scores, and the CRF over them and the picture."""
    predict, image = integer_predict(integer_weight(5) / 16), picture(24, 40)
    crf = CrfConfig(iterations=2, bilateral_sxy=8.0, bilateral_srgb=60.0)
    options = Inference(scales=(0.5, 1.5), flip=True, average=average, crf=crf)
    arguments = (predict, image, torch.arange(5), options, out_size)
    scores = dense_scores(*arguments)
    shares = scores if average == "probabilities" else scores.softmax(dim=0)
    shown = resize_image(image, out_size or (24, 40)).permute(1, 2, 0).numpy()
    expected = torch.from_numpy(dense_crf(shown, shares.numpy(), crf))
    label, confidence = segment_confident(*arguments)
    torch.testing.assert_close(confidence, expected.amax(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected.gather(0, label[None])[0], confidence, rtol=1e-4, atol=1e-5)
    assert torch.equal(label, segment(*arguments))
    assert (label != scores.argmax(dim=0)).float().mean() > 0.05  # it does something


def test_a_crf_over_more_than_the_memory_is_refused():
    options = Inference("whole", crf=CrfConfig(), memory_bytes=2**20)
    with pytest.raises(ValueError, match=r"over 900 classes of 24 x 40 pixels .* 79 MiB.*only 1"):
        segment(integer_predict(integer_weight(900)), picture(24, 40), torch.arange(900), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales is \(\); it must be one or more finite"),
        ({"scales": (1.0, 0.0)}, r"scales is \(1.0, 0.0\)"),
        ({"scales": (-1.0,)}, "scales is"),
        ({"scales": (float("inf"),)}, "scales is"),
        ({"scales": (float("nan"),)}, "scales is"),
        ({"swap": ((1, 1),)}, r"swap is \(\(1, 1\),\); it must be pairs of two different"),
        ({"swap": ((1, 2), (2, 3))}, "swap is"),
        ({"average": "sum"}, "average is 'sum'"),
    ],
)
def test_views_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Inference(**options)


def test_settings_become_an_inference():
    vocabulary = Vocabulary(tuple(Category(uid, uid) for uid in ("dog", "left", "right")))
    settings = ValidationConfig(
        "val", mode="whole", resize=(50, 40), window=30, stride=20, scales=(0.5, 2.0), flip=True,
        swap=(("right", "left"),), average="probabilities", keep_ratio=False,
    )  # fmt: skip
    assert Inference.of(settings, vocabulary) == Inference(
        "whole", (50, 40), 30, 20, (0.5, 2.0), True, ((2, 1),), "probabilities", keep_ratio=False
    )
    assert Inference.of(ValidationConfig("val"), vocabulary) == Inference()
    wide, tall = picture(30, 60), picture(60, 30)
    assert Inference(resize=(40, 20)).fitted(wide).shape == (3, 20, 40)
    assert Inference(resize=(40, 40)).fitted(wide).shape == (3, 20, 40)
    square = Inference(resize=(40, 40), keep_ratio=False)
    assert square.fitted(wide).shape == square.fitted(tall).shape == (3, 40, 40)
    settings = ValidationConfig("val", swap=(("left", "righ"),))
    with pytest.raises(ValueError, match=r"validation.swap: .*no class has uid 'righ'.*'right'"):
        Inference.of(settings, vocabulary)
