"""What is kept of where a picture came from."""

import json

import torch

from memseg_dist.data.vocabulary import Category, Vocabulary
from memseg_dist.tools.predict import find_pictures, write_prediction

SIGNED = "https://me:hush@example.org/photos/a.b.jpg?Signature=hush/hush.hush"


def test_no_signature_or_password_of_a_url_is_written(tmp_path):
    found, _ = find_pictures([SIGNED])
    assert found == {"a.b": SIGNED}  # it is fetched by the whole URL
    labels = torch.zeros(4, 5, dtype=torch.int64)
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    vocabulary = Vocabulary((Category("n0", "cat"),))
    write_prediction(tmp_path, "a.b", SIGNED, image, labels, vocabulary)
    assert json.loads((tmp_path / "a.b.json").read_text())["image"] == (
        "https://example.org/photos/a.b.jpg"
    )
    write_prediction(tmp_path, "c", "photos/c?d.jpg", image, labels, vocabulary)
    assert json.loads((tmp_path / "c.json").read_text())["image"] == "photos/c?d.jpg"
