"""What an evaluation spends its time on: codes, pixels, features, scores, files. Real evaluations of random weights.

    python -m scripts.benchmark_evaluation --output RESULTS.json
    python -m scripts.benchmark_evaluation --model lpd_debug --img_size 64 --num_images 8 --eval_bsz 4 --device cpu

Features are Inception's where its weights and torch-fidelity are at hand, else those of a classifier of this project
with the architecture --arch, with random weights; the result names it. Times do not depend on the weights. Prints a row
of each measurement and, as the last line, everything as JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.decoding.decoder import DECODE_PATHS, Decoder, resolve_path
from engine.decoding.latency import measure_latency, synchronize
from engine.evaluation.config import EvalConfig
from engine.evaluation.evaluate import evaluate
from engine.evaluation.inputs import open_inputs
from engine.scoring.classifier import Classifier, ClassifierConfig, save_classifier
from engine.scoring.config import ScoringConfig
from engine.scoring.features import INCEPTION, FeatureExtractor, inception_cache, load_feature_extractor
from engine.scoring.statistics import FeatureStatistics, save_reference_statistics
from models import MODEL_SIZES, build_model
from models.sampling import Sampling
from orders.config import OrderConfig
from scripts.benchmark_latency import random_tokenizer
from scripts.benchmarking import BenchmarkConfig, Report, read_config
from util.cli import exit_on_user_error
from util.config import MAX_COUNT, MAX_SIDE, setting
from util.dist import Dist
from util.errors import UserError

PUBLISHED_IMAGES = 50_000
INPUT_SIZE = 299  # of Inception
RUNS = 10  # batches that the time of pixels is taken from


@dataclass(frozen=True, kw_only=True)
class EvaluationBenchmark(BenchmarkConfig):
    """What to measure; what is None by default follows the device."""

    model: str = setting("lpd_l", "size", choices=tuple(MODEL_SIZES))
    img_size: int = setting(256, "pixels", at_least=1, at_most=MAX_SIDE)
    generation_steps: int = setting(20, "decoding steps", at_least=1, at_most=MAX_COUNT)
    cfg: float = setting(4.8, "guidance scale", at_least=1, at_most=1e6)
    num_images: int = setting(1024, "images of an evaluation", at_least=1)
    eval_bsz: int = setting(64, "images per batch", at_least=1)
    decode_path: str = setting("auto", "as of an evaluation", choices=DECODE_PATHS)
    bf16: bool = setting(None, "bfloat16 (default: on a GPU)")
    inception_path: Path | None = setting(None, "Inception weights (default: those in torch's hub cache, if any)")
    arch: str = setting("inception_v3", "timm architecture, where Inception's weights are not at hand")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_images < 2 * self.eval_bsz:
            raise UserError(f"--num_images {self.num_images} must be two batches of {self.eval_bsz} at least.")


class TimedExtractor:
    """Counts the seconds of a feature extractor, the device synchronised before and after."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.seconds, self._forward = 0.0, extractor.forward
        self.extractor = dataclasses.replace(extractor, forward=self.forward)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = self.extractor.device
        synchronize(device)
        start = time.perf_counter()
        result = self._forward(images)
        synchronize(device)
        self.seconds += time.perf_counter() - start
        return result


def open_extractor(config: EvaluationBenchmark, device: torch.device, folder: Path) -> FeatureExtractor:
    """Inception, or a classifier with random weights, which is written to ``folder``."""
    cached = inception_cache().is_file() and importlib.util.find_spec("torch_fidelity") is not None
    if config.inception_path is not None or cached:
        return load_feature_extractor(INCEPTION, device, config.inception_path)
    classifier = Classifier(ClassifierConfig(config.arch, 1000, config.img_size, INPUT_SIZE))
    for parameter in classifier.parameters():
        if parameter.ndim == 4:  # activations of timm's first weights grow to 1e11 in inception_v3
            nn.init.kaiming_normal_(parameter)
    save_classifier(classifier, tuple(map(str, range(1000))), folder / "classifier.pt")
    return load_feature_extractor(str(folder / "classifier.pt"), device)


def write_reference(path: Path, extractor: FeatureExtractor) -> None:
    """Statistics of random features, which cost what real ones do."""
    statistics = FeatureStatistics(extractor.feature_dim, extractor.device)
    statistics.update(torch.randn(2 * extractor.feature_dim, extractor.feature_dim))
    save_reference_statistics(path, statistics, {"extractor": extractor.name})


class Benchmark:
    """One model, tokenizer and extractor; every row is an evaluation in the same process."""

    def __init__(self, config: EvaluationBenchmark, device: torch.device, folder: Path) -> None:
        self.config, self.folder, self.dist = config, folder, Dist(0, 1, device)
        torch.manual_seed(0)
        self.tokenizer = random_tokenizer().to(device).eval()
        stride, vocab_size = self.tokenizer.stride, self.tokenizer.config.codebook_size
        with torch.device(device):
            self.model = build_model(config.model, img_size=config.img_size, stride=stride, vocab_size=vocab_size)
        self.model.eval()
        self.timed = TimedExtractor(open_extractor(config, device, folder))
        extractor = self.timed.extractor
        self.reference = folder / "reference.npz"
        write_reference(self.reference, extractor)
        self.report = Report(config, device)
        self.report.content |= {
            "benchmark": "evaluation",
            "decode_path": resolve_path(config.decode_path, device, torch.float32, config.bf16),
            "extractor": extractor.name,
            "random_extractor_weights": extractor.name != INCEPTION,
            "feature_dim": extractor.feature_dim,
        }

    def evaluation(self, scored: bool, num_images: int, save_images: bool = False) -> dict[str, Any]:
        """Run one; its seconds by what they were spent on.

        ``loop`` holds generation, features and ``rest_of_loop``: preparing the decoder, copies, partial files.
        ``outside_loop`` is what comes before and after: a sum over the weights, grid and results, and the scores.
        """
        config = self.config
        scoring = ScoringConfig(INCEPTION, None, self.reference) if scored else ScoringConfig(None)
        evaluation = EvalConfig(
            output_dir=self.folder / "evaluation",
            num_images=num_images,
            eval_bsz=config.eval_bsz,
            decode_path=config.decode_path,
            bf16=config.bf16,
            save_images=save_images,
            orders=OrderConfig(generation_steps=config.generation_steps),
            sampling=Sampling(config.cfg),
            scoring=scoring,
        )
        extractor = self.timed.extractor if scored else None
        inputs = open_inputs(evaluation, self.model.config, self.dist, extractor=extractor)
        self.timed.seconds = 0.0
        start = time.perf_counter()
        results = evaluate(self.model, self.tokenizer, evaluation, inputs, self.dist)
        total = time.perf_counter() - start
        loop = num_images / results["images_per_sec"]
        generating, features = results["sec_per_image"] * num_images, self.timed.seconds
        return {
            "images": num_images,
            "generating_sec": generating,
            "features_sec": features,
            "rest_of_loop_sec": loop - generating - features,
            "outside_loop_sec": total - loop,
            "total_sec": total,
        }

    def pixels_share(self) -> float:
        """Share of a batch's generation that goes from codes to pixels."""
        config = self.config
        sizes = OrderConfig(generation_steps=config.generation_steps).for_grid(self.model.config.grid_size, 0)
        codes, pixels = (
            measure_latency(
                Decoder(
                    self.model, sizes.group_sizes, Sampling(config.cfg), config.eval_bsz, tokenizer=tokenizer,
                    path=config.decode_path, bf16=config.bf16,
                ), 2, RUNS,
            ).median_s
            for tokenizer in (None, self.tokenizer)
        )  # fmt: skip
        return 1 - codes / pixels

    def run(self) -> None:
        count = self.config.num_images
        self.evaluation(True, 2 * self.config.eval_bsz)  # compiles, and chooses kernels
        for case, scored, save_images in (
            ("pictures alone", False, False),
            ("pictures and scores", True, False),
            ("pictures, scores and PNG files", True, True),
        ):
            self.report.add("rows", {"case": case} | self.evaluation(scored, count, save_images))
        alone, scored_row, _ = self.report.content["rows"]
        generating, features = (scored_row[f"{name}_sec"] / count for name in ("generating", "features"))
        scores = max(0.0, scored_row["outside_loop_sec"] - alone["outside_loop_sec"])
        scoring = PUBLISHED_IMAGES * features + scores
        self.report.content |= {
            "pixels_share_of_generating": self.pixels_share(),
            # Of the loop, once it runs.
            "images_per_sec_without_scores": 1 / generating,
            "images_per_sec_with_features": 1 / (generating + features),
            "scores_sec": scores,
            # Extrapolated: features by the number of images, the scores at the end as measured.
            "scoring_share_of_50000_images": scoring / (PUBLISHED_IMAGES * generating + scoring),
        }
        self.report.finish()


def main() -> None:
    config, device = read_config(EvaluationBenchmark, __doc__)
    config = config.with_defaults(bf16=device.type == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        Benchmark(config, device, Path(folder)).run()


if __name__ == "__main__":
    exit_on_user_error(main)
