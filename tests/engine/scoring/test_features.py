"""Inception features: the real architecture with random weights against torch-fidelity; where weights come from."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.scoring import features, metrics
from engine.scoring.features import INCEPTION, INCEPTION_FILE, INCEPTION_URL, SPATIAL_DIM, load_feature_extractor
from engine.scoring.statistics import FeatureStatistics
from util.data.images import ImageFolder
from util.data.loading import image_batches
from util.errors import UserError
from util.files import sha256

inception, metric_fid, metric_isc, fidelity_utils = (
    pytest.importorskip(f"torch_fidelity.{name}")
    for name in ("feature_extractor_inceptionv3", "metric_fid", "metric_isc", "utils")
)
NUM_IMAGES, SIZE = 11, 40  # ten splits of the Inception Score need ten images


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under which activations neither vanish nor explode."""
    path = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        network = inception.FeatureExtractorInceptionV3(INCEPTION, ["2048"], verbose=False)
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def trusted(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", sha256(weights)[:8])
    return weights


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Smooth pictures of different colours, as PNG."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(NUM_IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{i:06}.png")
    return folder


@pytest.mark.slow
def test_streamed_scores_equal_torch_fidelity_on_the_folder(trusted: Path, pictures: Path) -> None:
    """Guards against another layer, another resizing or normalisation, an image lost between batches."""
    extractor = load_feature_extractor(INCEPTION, weights_path=trusted)
    statistics, all_logits = FeatureStatistics(extractor.feature_dim), []
    for images in image_batches(ImageFolder(pictures, SIZE, labelled=False), batch_size=4):
        feature, logits = extractor(images.permute(0, 3, 1, 2))
        statistics.update(feature)
        all_logits.append(logits)
    mean, deviation = metrics.inception_score(torch.cat(all_logits))

    settings: dict[str, Any] = {
        "input1": str(pictures),
        "cuda": False,
        "batch_size": 6,
        "verbose": False,
        "cache": False,
    }
    settings |= {"feature_extractor_weights_path": str(trusted), "save_cpu_ram": True}
    network = fidelity_utils.create_feature_extractor(INCEPTION, ["2048", "logits_unbiased"], **settings)
    theirs = fidelity_utils.extract_featuresdict_from_input_id_cached(1, network, **settings)
    expected = metric_fid.fid_featuresdict_to_statistics(theirs, "2048")
    expected_score = metric_isc.isc_featuresdict_to_metric(theirs, "logits_unbiased", **settings)
    np.testing.assert_allclose(statistics.mu(), expected["mu"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics.sigma(), expected["sigma"], atol=1e-3 * np.abs(expected["sigma"]).max())
    assert mean == pytest.approx(expected_score["inception_score_mean"], rel=1e-4)
    assert deviation == pytest.approx(expected_score["inception_score_std"], rel=1e-3, abs=1e-6)


def test_autocast_does_not_reach_the_features(trusted: Path) -> None:
    """Scores must not depend on the precision that images are generated in."""
    extractor = load_feature_extractor(INCEPTION, weights_path=trusted)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    plain = extractor(images)
    with torch.autocast("cpu", torch.bfloat16):
        inside = extractor(images)
    assert torch.equal(plain[0], inside[0])
    assert torch.equal(plain[1], inside[1])
    assert plain[0].dtype == torch.float32


def test_spatial_features_are_those_of_the_adm_suite(trusted: Path) -> None:
    """`mixed_6/conv:0`, 17 × 17 × the first 7 of 192 channels, laid out as TensorFlow does: channels last."""
    extractor = load_feature_extractor(INCEPTION, weights_path=trusted)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    network = extractor.forward
    assert isinstance(network, inception.FeatureExtractorInceptionV3)
    seen: list[torch.Tensor] = []
    hook = network.Mixed_6c.register_forward_hook(lambda module, inputs, output: seen.append(output))
    spatial = extractor.with_spatial(images)[2]
    hook.remove()
    branch = network.Mixed_6d.branch1x1
    maps = torch.relu(branch.bn(branch.conv(seen[0])))
    assert spatial.shape == (1, SPATIAL_DIM) == (1, 2023)
    for row, column, channel in ((0, 0, 0), (0, 1, 6), (3, 16, 2), (16, 0, 5)):
        assert spatial[0, (row * 17 + column) * 7 + channel] == maps[0, channel, row, column]


def test_loading_draws_no_random_numbers(trusted: Path) -> None:
    """An evaluation in mid-training must not change the training."""
    before = torch.get_rng_state()
    load_feature_extractor(INCEPTION, weights_path=trusted)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_weights_are_refused_by_hash(weights: Path) -> None:
    """Another Inception under the right name is the classic cause of a FID that does not match."""
    with pytest.raises(UserError, match=f"SHA-256 starts with {sha256(weights)[:8]} and should start with 6726825d"):
        load_feature_extractor(INCEPTION, weights_path=weights)


def test_weights_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity unpickles anything; a file that fits the short hash must still be plain tensors."""
    path = tmp_path / "evil.pth"
    torch.save({"x": Path("an object")}, path)
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", sha256(path)[:8])
    with pytest.raises(UserError, match="not plain data"):
        load_feature_extractor(INCEPTION, weights_path=path)


def test_missing_weights_say_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network the message must name the file, its source, its place, and what needs no such file."""
    assert INCEPTION_URL == inception.URL_INCEPTION_V3, "torch-fidelity moved its weights"

    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as raised:
        load_feature_extractor(INCEPTION)
    for part in (
        INCEPTION_FILE, INCEPTION_URL, str(tmp_path / "checkpoints"), "--inception_path",
        "--feature_extractor none", "python -m engine.classifier",
    ):  # fmt: skip
        assert part in str(raised.value)
    with pytest.raises(UserError, match="gone.pth"):  # noqa: RUF043
        load_feature_extractor(INCEPTION, weights_path=tmp_path / "gone.pth")
    with pytest.raises(UserError, match="inception-v4"):
        load_feature_extractor("inception-v4")


def test_weights_are_downloaded_once(trusted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(url: str, path: str, hash_prefix: str) -> None:
        calls.append((url, hash_prefix))
        Path(path).write_bytes(trusted.read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    hashes = {load_feature_extractor(INCEPTION).weights_hash for _ in range(2)}
    assert hashes == {sha256(trusted)}
    assert calls == [(INCEPTION_URL, features.INCEPTION_SHA256_PREFIX)]
