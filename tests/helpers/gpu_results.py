"""What scripts/gpu_suite.py leaves, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from util.files import write_json

GPU = {"device": "a GPU", "driver": "570.1", "cuda": "12.8", "torch": "2.11.0", "triton": "3.6.0"}
REVISION = "0123456789" * 4


def latency_result(path: str, batch_size: int, pixels: bool, median_ms: float, **more: Any) -> dict[str, Any]:
    rates = {"images_per_sec": 1000 * batch_size / median_ms, "weight_bytes_share": 0.25, "flops_share": None}
    return {
        "batch_size": batch_size, "path": path, "pixels": pixels, "warmup": 20, "runs": 50, "median_ms": median_ms,
        "peak_memory_gib": 3.21, **rates, **more,
    }  # fmt: skip


def write_suite(out: Path, **more: Any) -> None:
    """A folder as the suite leaves it on a GPU, with made-up figures.

    Args:
        more: into the summary.
    """
    by_path = [
        latency_result(path, 1, pixels, median_ms)
        for path, median_ms in (("plain", 100.0), ("graph", 12.5))
        for pixels in (False, True)
    ]
    by_path[1] |= {"speed_up": 1.0}
    by_path[3] |= {"median_ms": 20.0, "speed_up": 5.0}
    by_path[2] |= {"graph_nodes": 2345}
    products = [
        {"product": "fc1", "rows": 12, "by": by, "weights": weights, "pdl": pdl, "us": us, "chosen": chosen,
         "columns": columns, "block": 128, "split": 1, "stages": 5}
        for by, weights, pdl, us, chosen, columns in (
            ("library", "bfloat16", False, 5.04, False, None), ("own", "bfloat16", True, 4.06, True, 32),
            ("own", "bfloat16", True, 3.52, False, 64), ("own", "bfloat16", False, 4.51, True, 32),
            ("own", "float8", True, 2.5, True, 32),
        )
    ]  # fmt: skip
    row = [latency_result("graph", 1, True, 20.0), latency_result("graph", 64, True, 200.0)]
    train = {
        "model": "lpd_l", "img_size": 256, "batch_size": 64, "dtype": "bfloat16 autocast",
        "rows": [
            {"name": "plain", "failed": "out of memory", "peak_memory_gib": 70.0},
            {"name": "fast", "images_per_sec": 512.0, "peak_share": 0.4, "median_sec_per_step": 0.125,
             "peak_memory_gib": 20.0},
        ],
    }  # fmt: skip
    drawing = [
        {"img_size": size, "steps": steps, "implementation": name, "orders_per_sec": rate}
        for size, steps in ((256, 20), (512, 48))
        for name, rate in (("NumPy, 1 thread", 1790.0), ("torch, a GPU", 1234567.0))
    ]
    evaluation = {
        "model": "lpd_l", "img_size": 256, "generation_steps": 20, "eval_bsz": 64, "extractor": "classifier-net",
        "random_extractor_weights": True, "images_per_sec_without_scores": 400.0, "images_per_sec_with_features": 300.0,
        "pixels_share_of_generating": 0.125, "scores_sec": 7.5, "scoring_share_of_50000_images": 0.25,
    }  # fmt: skip
    tests = {"passed": 16, "failed": 1, "skipped": 0, "seconds": 3.0, "failures": []}
    contents: dict[str, tuple[str, dict[str, Any]]] = {
        "tests": ("tests", tests),
        "latency_by_path": ("latency", {"results": by_path}),
        "latency_lpd_l_res256_steps20": ("latency", {"results": row}),
        "kernels": ("kernels", {}),
        "tiles": ("tiles", {"model": "lpd_l", "products": [*products, products[0] | {"rows": 78}]}),
        "train": ("train", train),
        "orders": ("orders", {"drawing": drawing}),
        "evaluation": ("evaluation", evaluation),
    }
    parts = {}
    for name, (group, content) in contents.items():
        write_json(out / f"{name}.json", content | {"output": str(out / f"{name}.json")})
        parts[name] = {
            "group": group, "command": f"python of {name}", "tiny": False, "quick": True, "date": "2026-01-02",
            "state": "failed" if name == "tests" else "finished", "seconds": 1.0, "result": f"{name}.json",
            "revision": REVISION,
            "error": None,
        }  # fmt: skip
    (out / "kernels").mkdir()
    (out / "kernels" / "graph.txt").write_text("attention 1 ms\n")
    write_json(out / "summary.json", GPU | {"parts": parts} | more)
