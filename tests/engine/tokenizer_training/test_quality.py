"""What reconstructions are worth: figures by their definitions, a classifier's view, and when to warn."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from engine.scoring.features import FeatureExtractor
from engine.scoring.metrics import frechet_distance
from engine.tokenizer_training.quality import Interrupted, ceiling_warnings, evaluate, judge, ssim
from tests.helpers.tokenizer_case import CPU, MODEL, Blobs
from tokenizers.vq_model import VQModel
from util.pictures import to_float, to_uint8


def test_psnr_is_that_of_the_definition() -> None:
    model = VQModel(MODEL).eval()
    pixels = torch.stack([image for image, _ in (Blobs()[i] for i in range(3))])
    with torch.no_grad():
        decoded = model.decode(model.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1)).clamp(-1, 1)
    error = ((decoded + 1) * 127.5 - pixels.permute(0, 3, 1, 2)).double().square().mean((1, 2, 3))
    expected = (10 * torch.log10(255**2 / error)).mean().item()
    assert evaluate(model, pixels, 2)["psnr_db"] == pytest.approx(expected, abs=1e-3)


def test_evaluation_stops_when_told() -> None:
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        evaluate(VQModel(MODEL).eval(), Blobs().images, 8, lambda: next(answers))
    assert next(answers, None) is None


@pytest.mark.parametrize("shape", [(16, 20), (11, 11)])
def test_ssim_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    """Wang et al., equation 13, with scipy's Gaussian filter cut at the same 11 pixels."""
    a = torch.rand(2, 3, *shape, dtype=torch.float64)
    b = (a + 0.3 * torch.rand_like(a)).clamp(0, 1)

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    for x, y, found in zip(a.numpy(), b.numpy(), ssim(a, b), strict=True):
        values = []
        for p, q in zip(x, y, strict=True):
            mean_p, mean_q = blur(p), blur(q)
            var_p, var_q, cov = blur(p * p) - mean_p**2, blur(q * q) - mean_q**2, blur(p * q) - mean_p * mean_q
            values.append(
                (2 * mean_p * mean_q + 1e-4)
                * (2 * cov + 9e-4)
                / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4))
            )
        assert float(found) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_of_equal_and_of_tiny_images() -> None:
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    assert float(ssim(image, image)) == pytest.approx(1)
    assert float(ssim(image, 1 - image)) < 0.5


class Brightness:
    """Pictures of two classes, dark and bright, in the order of the classes."""

    def __init__(self, count: int) -> None:
        self.labels = [int(i >= count / 2) for i in range(count)]
        noise = torch.randint(0, 40, (count, 8, 8, 3), dtype=torch.uint8)
        self.images = noise + 200 * torch.tensor(self.labels, dtype=torch.uint8).view(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def _colours(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colours as features; dark pictures are of class 0, bright ones of class 1."""
    colour = images.float().mean((2, 3)) / 255
    return colour, torch.stack([0.5 - colour.mean(1), colour.mean(1) - 0.5], 1)


READER = FeatureExtractor("reader", 3, ("dark", "bright"), "0123", CPU, _colours)


def _judge(model: VQModel, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "extractor": READER, "train_set": Brightness(30), "held_out_set": Brightness(10), "same_classes": True,
        "batch_size": 4, "num_workers": 0,
    }  # fmt: skip
    return judge(model, changes.pop("interrupted", lambda: False), **(options | changes))


def test_a_classifier_judges_pictures_and_reconstructions() -> None:
    """Guards against scores of the wrong pictures: brute force over whole sets at once."""
    model, train_set, held_out_set = VQModel(MODEL).eval(), Brightness(30), Brightness(10)
    found = _judge(model, train_set=train_set, held_out_set=held_out_set)
    with torch.no_grad():
        made = to_uint8(model.decode(model.encode(to_float(held_out_set.images))))
    features = {}
    for name, pixels in (("train", train_set.images), ("real", held_out_set.images), ("reconstructed", made)):
        features[name], logits = _colours(pixels.permute(0, 3, 1, 2))
        if name != "train":
            right = (logits.argmax(1) == torch.tensor(held_out_set.labels)).double().mean()
            assert found[f"class_accuracy_{name}"] == pytest.approx(float(right), abs=1e-4)
    moments = {name: (x.double().numpy().mean(0), np.cov(x.double().numpy().T)) for name, x in features.items()}
    for name in ("real", "reconstructed"):
        distance = frechet_distance(*moments["train"], *moments[name])
        assert found[f"frechet_distance_{name}"] == pytest.approx(distance, abs=1e-4)
    assert found["class_accuracy_real"] == 1
    assert found["class_accuracy_reconstructed"] == 0.5  # an untrained tokenizer makes everything grey
    assert found["extractor_sha256"] == "0123"


def test_what_can_not_be_judged_is_left_out() -> None:
    one = Brightness(1)
    assert _judge(VQModel(MODEL).eval(), held_out_set=one, same_classes=False).keys() == {"extractor_sha256"}
    with pytest.raises(Interrupted):
        _judge(VQModel(MODEL).eval(), interrupted=lambda: True)


GOOD: dict[str, Any] = {
    "step": 90, "psnr_db": 25.0, "ssim": 0.9, "codebook_share": 0.9, "held_out_tokens": 10_000,
    "tokenizer": {"codebook_size": 100}, "training": {"vqgan_path": None},
}  # fmt: skip
LINES = [{"step": 30, "psnr_db": 20.0}, {"step": 60, "psnr_db": 24.9}, {"step": 90, "psnr_db": 25.0}]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"class_accuracy_real": 0.9, "class_accuracy_reconstructed": 0.8}, "the tokenizer is the ceiling.*80.0%.*90"),
        ({"class_accuracy_real": 0.9, "class_accuracy_reconstructed": 0.88}, None),
        ({"ssim": 0.5}, r"far from the pictures \(SSIM 0.500\).*--feature_extractor"),
        ({"ssim": 0.5, "class_accuracy_real": 0.9, "class_accuracy_reconstructed": 0.9}, None),
        ({"codebook_share": 0.2}, "only 20.0% of the 100 codes"),
        ({"codebook_share": 0.2, "held_out_tokens": 25}, None),  # so few tokens can't show more
        ({"codebook_share": 0.2, "training": {"vqgan_path": "vq.pt"}}, None),  # its size is given
        ({"psnr_db": 25.4}, r"still getting better \(\+0.50 dB"),
        ({}, None),
    ],
)
def test_warnings_say_what_limits(changes: dict[str, Any], warning: str | None) -> None:
    found = ceiling_warnings(GOOD | changes, LINES)
    assert len(found) == (warning is not None)
    if warning is not None:
        assert re.search(warning, found[0])
