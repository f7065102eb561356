import torch

from memseg_dist.methods.larvseg.classifier import CosineClassifier


def test_cosine_classifier_gives_unit_vectors():
    classifier = CosineClassifier(10, 6)
    x = classifier.embed(torch.randn(2, 6, 3, 4))
    assert x.shape == (2, 12, 6)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(2, 12))
    w = classifier.class_weights(torch.tensor([1, 5]))
    torch.testing.assert_close(w.norm(dim=-1), torch.ones(2))
