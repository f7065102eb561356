"""A crop's map lands where the crop was cut."""

import pytest
import torch

from memseg_dist.batch import CropBox, onto_device
from memseg_dist.methods.rca import accumulate
from memseg_dist.methods.rca.accumulate import onto_stored_image


@pytest.mark.parametrize("flipped", [False, True])
def test_a_crop_lands_where_it_was_cut(flipped):
    """A crop of the right lower part, padded: its ramp continues that of the whole image."""
    size = 20
    ramp = ((torch.arange(size) + 0.5) / size).expand(size, size)
    left, top, width, height = 0.4, 0.3, 0.5, 0.6
    fine = 64
    across = left + width * (torch.arange(48) + 0.5) / 48
    crop = torch.zeros(fine, fine)
    crop[:40, :48] = across.flip(0) if flipped else across
    box = CropBox(left, top, width, height, flipped, 40, 48)
    found = onto_stored_image(crop[None], [box], (fine, fine), size)[0]
    centre = (torch.arange(size) + 0.5) / size
    inside = ((centre > top) & (centre < top + height))[:, None] & (
        (centre > left) & (centre < left + width)
    )
    assert ((found > 0) == inside).all()
    # the boxes at the crop's right edge are blended with its padding
    inner = inside & (centre < left + width - 1 / size) & (centre > left + 1 / size)
    inner &= (centre < top + height - 1 / size)[:, None]
    assert (found - ramp)[inner].abs().max() < 0.01


def test_what_the_host_makes_goes_up_in_one_copy(monkeypatch):
    """From pinned memory, which `onto_device` takes: from another the copy would wait."""
    packed = []

    def watched(device, *arrays):
        packed.append(len(arrays))
        return onto_device(device, *arrays)

    monkeypatch.setattr(accumulate, "onto_device", watched)
    box = CropBox(0.0, 0.0, 1.0, 1.0, False, 8, 8)
    onto_stored_image(torch.ones(2, 4, 4), [box, box], (8, 8), 4)
    assert packed == [2]
