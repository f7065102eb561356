"""A and B against loops over pixels: they belong together, and are drawn from the seed alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from no_host_sync import no_host_sync, pretended_device
from reference import three_stage as reference
from torchvision.transforms.v2 import functional as torchvision

from memseg_dist.batch import IGNORE, Clock
from memseg_dist.methods.three_stage.config import ThreeStageConfig
from memseg_dist.methods.three_stage.strong import (
    COLOUR,
    GEOMETRIC,
    OPERATIONS,
    Drawn,
    Operators,
    draw,
    draw_operators,
)

HEIGHT, WIDTH = SIZE = (22, 27)
FILL = torch.tensor([124.0, 116.0, 104.0])[:, None, None]
NO_BOXES = np.zeros((0, 4), np.int64)
CONFIG = ThreeStageConfig()


def composed(*names: str) -> np.ndarray:
    matrix = np.eye(3)
    for number, name in enumerate(names):
        matrix = matrix @ GEOMETRIC[name](7 - 2 * number, (-1) ** number, HEIGHT, WIDTH)
    return matrix


MATRICES = {
    "none": np.eye(3),
    **{
        f"{name} {sign * magnitude}": GEOMETRIC[name](magnitude, sign, HEIGHT, WIDTH)
        for name in GEOMETRIC
        for magnitude, sign in ((1, -1), (4, 1), (9, -1))
    },
    "rotate, shear": composed("rotate", "shear_x"),
    "shear, translate, rotate": composed("shear_y", "translate_x", "rotate"),
    "shear twice, translate": composed("shear_x", "shear_x", "translate_y"),
}


def operators_of(*matrices: np.ndarray, boxes=NO_BOXES, colours=(), device="cpu") -> Operators:
    return Operators([Drawn(matrix, colours, boxes) for matrix in matrices], SIZE, device)


def blobs() -> torch.Tensor:
    """A label map of four classes in large pieces."""
    coarse = torch.randint(0, 4, (4, 4), generator=torch.Generator().manual_seed(3))
    return coarse.repeat_interleave(7, 0).repeat_interleave(7, 1)[:HEIGHT, :WIDTH]


@pytest.mark.parametrize("name", MATRICES)
def test_both_read_what_loops_over_pixels_read(name):
    matrix, label = MATRICES[name], blobs()
    image = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    valid = torch.ones(1, *SIZE, dtype=torch.bool)
    valid[:, -3:] = False  # padding
    operators = operators_of(matrix)
    found = operators.maps((1 + label)[None, None].float())[0, 0].long() - 1
    wanted = reference.warped_nearest(label, matrix, IGNORE)
    differs = (found != wanted) & ~reference.is_tie(matrix, SIZE)
    assert not differs.any()
    padded = torch.where(valid[0], image[0].double(), FILL.double())
    wanted = reference.warped_bilinear(padded, matrix, FILL.flatten().double())
    found = operators.images(image, valid, FILL)[0].double()
    assert (found - wanted).abs().max() <= 0.501  # it is rounded


@pytest.mark.parametrize("name", MATRICES)
def test_the_label_of_the_changed_image_is_the_changed_label(name):
    """B y is what stands in A x, in an image that shows its labels as colours."""
    label, valid = blobs(), torch.ones(1, *SIZE, dtype=torch.bool)
    colors = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 240]])
    images = colors[label].permute(2, 0, 1)[None].to(torch.uint8)
    operators = operators_of(MATRICES[name])
    changed = operators.images(images, valid, FILL)[0]
    stacked = operators.maps(torch.stack([1.0 + label, valid[0].float()])[None])[0].long()
    shown = (changed - colors[:, :, None, None]).abs().amax(dim=1) == 0  # [4, H, W]
    is_pure, in_frame = shown.any(dim=0), stacked[1] == 1
    assert (is_pure & in_frame).sum() > 0.3 * label.numel()
    there = stacked[0] - 1
    assert torch.equal(shown.long().argmax(dim=0)[is_pure & in_frame], there[is_pure & in_frame])
    assert (there[~in_frame] == IGNORE).all()
    if name != "none":
        assert not in_frame.all() and not torch.equal(there, label)


def test_each_image_has_its_own_operators():
    images = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8)
    valid = torch.ones(3, *SIZE, dtype=torch.bool)
    matrices = [MATRICES[name] for name in ("rotate 4", "none", "shear_x -9")]
    together = operators_of(*matrices)
    for index, matrix in enumerate(matrices):
        alone = operators_of(matrix).images(images[[index]], valid[[index]], FILL)
        assert torch.equal(together.images(images, valid, FILL)[[index]], alone)
    assert torch.equal(together.images(images, valid, FILL)[1], images[1])


def test_boxes_are_cut_at_the_border():
    boxes = np.array([[-2, 3, -1, 4], [20, 25, 25, 30], [5, 8, 10, 13], [4, 4, 2, 2]])
    cut = operators_of(np.eye(3), boxes=boxes).cut_out()[0]
    for y in range(HEIGHT):
        for x in range(WIDTH):
            inside = [top <= y < bottom and left <= x < right for top, bottom, left, right in boxes]
            assert cut[y, x] == any(inside)
    assert not operators_of(np.eye(3)).cut_out().any()


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("autocontrast", torchvision.autocontrast_image),
        ("sharpness", lambda image: torchvision.adjust_sharpness_image(image, 0.18 * 7 + 0.1)),
    ],
)
def test_own_colour_operations_are_torchvisions(name, theirs):
    images = [
        torch.randint(40, 200, (3, *SIZE), dtype=torch.uint8),
        (torch.rand(3, *SIZE) ** 3 * 255).to(torch.uint8),
        torch.full((3, *SIZE), 77, dtype=torch.uint8),
        torch.randint(0, 2, (3, *SIZE), dtype=torch.uint8) * 255,
    ]
    images.append(torch.cat([images[0][:1], images[2][:2]]))  # one channel is constant
    for image in images:
        before = image.clone()
        found, wanted = COLOUR[name](image, 7).int(), theirs(image).int()
        assert (found - wanted).abs().max() <= 1
        assert torch.equal(image, before)
    if name == "sharpness":
        assert torch.equal(COLOUR[name](images[0][:, :2], 7), images[0][:, :2])


def test_the_ranges_of_the_code():
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    values = {name: [COLOUR[name](image, m)[0].flatten() for m in (1, 9)] for name in COLOUR}
    assert [len(part.unique()) for part in values["posterize"]] == [16, 2]
    assert [int((part != image[0].flatten()).sum()) for part in values["solarize"]] == [25, 230]
    assert [int(part[100]) for part in values["brightness"]] == [28, 172]
    (cosine, sine, _), *_ = GEOMETRIC["rotate"](9, 1, 10, 10)
    assert np.degrees(np.arctan2(sine, cosine)) == pytest.approx(27)
    assert GEOMETRIC["shear_x"](9, -1, 10, 10)[0, 1] == pytest.approx(-0.27)
    assert GEOMETRIC["translate_y"](9, 1, 10, 10)[1, 2] == 9


def test_colours_follow_in_the_order_drawn():
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    valid = torch.ones(1, *SIZE, dtype=torch.bool)
    operators = operators_of(np.eye(3), colours=(("solarize", 5), ("brightness", 2)))
    wanted = COLOUR["brightness"](COLOUR["solarize"](images[0], 5), 2)
    assert torch.equal(operators.images(images, valid, FILL)[0], wanted)


# ---------------------------------------------------------------- what is drawn


def same(one: Drawn, other: Drawn) -> bool:
    arrays = np.array_equal(one.matrix, other.matrix) and np.array_equal(one.boxes, other.boxes)
    return arrays and one.colours == other.colours


def test_the_clock_alone_decides():
    """Whatever the worker, and whether it repeats the slot."""
    config = dataclasses.replace(CONFIG, randaugment_chance=1.0)

    def drawn(clock: Clock) -> list[Drawn]:
        random = Random(clock.seed_for("strong augmentation"))
        return [draw(config, random, 64, 48) for _ in range(3)]

    first = drawn(Clock(4, slot=2, num_slots=5, seed=1))
    again = drawn(Clock(4, slot=2, num_slots=5, seed=1, idle=True, num_steps=9))
    assert all(map(same, first, again)) and not same(first[0], first[1])
    for other in (Clock(5, 2, 5, seed=1), Clock(4, 1, 5, seed=1), Clock(4, 2, 5, seed=2)):
        assert not any(map(same, first, drawn(other)))


def test_operations_are_drawn_alike_with_replacement():
    names: Counter[str] = Counter()
    random, config = Random(0), dataclasses.replace(CONFIG, randaugment_ops=1, cutout_boxes=0)
    for _ in range(4000):
        one = draw(config, random, 64, 48)
        assert one.boxes.shape == (0, 4)
        names.update(name for name, _ in one.colours)
        names["geometric"] += not np.array_equal(one.matrix, np.eye(3))
    assert set(names) == {"geometric", *COLOUR} and len(OPERATIONS) == 14
    assert names.pop("geometric") == pytest.approx(4000 * 5 / 28, rel=0.15)
    assert all(count == pytest.approx(4000 / 28, rel=0.35) for count in names.values())
    twice = [draw(dataclasses.replace(CONFIG, randaugment_chance=1.0), random, 9, 9).colours
             for _ in range(300)]  # fmt: skip
    assert any(len({name for name, _ in one}) < len(one) for one in twice)
    never = dataclasses.replace(CONFIG, randaugment_chance=0.0)
    assert same(draw(never, Random(1), 9, 9), draw(never, Random(1), 9, 9))
    assert all(draw(never, random, 9, 9).colours == () for _ in range(50))


class Scripted(Random):
    """Applies these operations, one after another."""

    def __init__(self, *operations: tuple[str, int, int]) -> None:
        super().__init__(0)
        self.script = [value for name, _, sign in operations for value in (name, sign)]
        self.magnitudes = [magnitude for _, magnitude, _ in operations]

    def choice(self, options):
        return self.script.pop(0)

    def randint(self, low, high):
        return self.magnitudes.pop(0)

    def random(self):
        return 0.0


def test_one_map_is_all_operations_one_after_another():
    """Ramps, because reading between their pixels loses nothing."""
    operations = [("rotate", 3, 1), ("translate_x", 5, -1), ("shear_y", 4, 1)]
    rows, columns = torch.meshgrid(*map(torch.arange, SIZE), indexing="ij")
    ramps = step = torch.stack([rows, columns]).double()
    frame = torch.ones(1, *SIZE, dtype=torch.float64)
    nowhere = torch.zeros(2, dtype=torch.float64)
    for name, magnitude, sign in operations:
        matrix = GEOMETRIC[name](magnitude, sign, HEIGHT, WIDTH)
        step = reference.warped_bilinear(step, matrix, nowhere)
        frame = reference.warped_bilinear(frame, matrix, nowhere[:1])
    one = draw(CONFIG, Scripted(*operations), HEIGHT, WIDTH)
    found = reference.warped_bilinear(ramps, one.matrix, nowhere)
    inside = frame[0] > 1 - 1e-9
    assert inside.sum() > 200
    torch.testing.assert_close(found[:, inside], step[:, inside])


def test_boxes_have_a_share_of_the_shorter_side():
    boxes = np.concatenate([draw(CONFIG, Random(seed), 320, 410).boxes for seed in range(200)])
    top, bottom, left, right = boxes.T
    assert (bottom - top == 32).all() and (right - left == 32).all() and len(boxes) == 600
    assert (top.min(), top.max()) >= (-16, 290) and left.max() > 380
    assert top.min() == pytest.approx(-16, abs=8) and left.max() == pytest.approx(393, abs=8)


# ---------------------------------------------------------------- devices


def everything(device) -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(COLOUR), 3, *SIZE), dtype=torch.uint8, generator=draws)
    drawn = [
        Drawn(matrix, ((name, 6),), np.array([[2, 9, 3, 8]]))
        for matrix, name in zip(MATRICES.values(), COLOUR)
    ]
    valid = torch.ones(len(images), *SIZE, dtype=torch.bool)
    images, valid, fill = (part.to(device, non_blocking=True) for part in (images, valid, FILL))
    operators = Operators(drawn, SIZE, device)
    return (
        operators.images(images, valid, fill),
        operators.maps(images.float()),
        operators.cut_out(),
    )


def test_no_operation_waits_for_the_device():
    with pretended_device() as device, no_host_sync():
        everything(device)
        draw_operators(CONFIG, Random(0), torch.ones(2, 8, 8, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_does_the_same():
    torch.backends.cuda.matmul.allow_tf32 = True
    (image, labels, cut), wanted = everything("cuda"), everything("cpu")
    assert (image.cpu().int() - wanted[0].int()).abs().float().mean() < 0.02
    assert (labels.cpu() != wanted[1]).float().mean() < 1e-3
    assert torch.equal(cut.cpu(), wanted[2])
