"""What an evaluation leaves behind: a line of results, a labelled grid, an npz for the ADM evaluator, the versions."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
import re
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from util.dist import Dist
from util.errors import UserError
from util.files import atomic_write
from util.pictures import image_grid
from util.readers import read_json_lines

RECORDED_PACKAGES = ("torch", "torchvision", "torch-fidelity", "timm", "numpy", "scipy", "pillow")
LABELS = "labels.csv"
GRID_CLASSES, GRID_IMAGES_PER_CLASS = 10, 8
MEASURED_ANEW = ("images_per_sec", "latency_s", "throughput_images_per_sec", "environment")


def grid_indices(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Images of the grid, (classes, images per class): up to 10 classes spread over all, the first 8 images of each."""
    classes, firsts, counts = np.unique(labels, return_index=True, return_counts=True)
    rows = np.unique(np.linspace(0, len(classes) - 1, GRID_CLASSES).round().astype(np.int64))
    return firsts[rows, None] + np.arange(min(GRID_IMAGES_PER_CLASS, counts.min()))


def draw_grid(
    images: NDArray[np.uint8], indices: NDArray[np.int64], labels: NDArray[np.int64], classes: Sequence[str] | None
) -> Image.Image:
    """Picture of ``images`` (G, H, W, 3), which are those numbered ``indices`` (rows, columns), with class names."""
    rows, columns = indices.shape
    texts = [classes[label] if classes else f"class {label}" for label in labels[indices.ravel()].tolist()]
    return image_grid(images, columns if columns > 1 else rows, texts)


def check_replaceable(folder: Path) -> None:
    """Refuse a folder of images that is not the output of an earlier evaluation, since it will be replaced."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    foreign = [name for name in names if name != LABELS and not re.fullmatch(r"\d{6,}(-[\w-]+)?\.png", name)]
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]!r}, which no evaluation wrote; choose another --output_dir.")


def write_labels(folder: Path, names: Sequence[str], labels: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Write ``labels.csv`` beside the images of these names: a list of images as every command takes it."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["image", "class", "label"])
    rows.writerows([name, classes[label], label] for name, label in zip(names, labels.tolist(), strict=True))
    with atomic_write(folder / LABELS) as file:
        file.write(text.getvalue().encode())


def write_adm_npz(path: Path, files: Sequence[Path], labels: NDArray[np.int64], seed: int) -> None:
    """`arr_0` uint8 (N, H, W, 3) and `arr_1` labels int64 (N,), shuffled together.

    The ADM evaluator splits the file in order for its Inception Score, which images sorted by class would cap. Images
    are streamed: 50,000 of them don't fit into memory everywhere.
    """
    order = np.random.default_rng(seed).permutation(len(labels))

    def load(index: int) -> NDArray[np.uint8]:
        return np.asarray(Image.open(files[index]))

    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *load(0).shape)}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive, ThreadPoolExecutor() as pool:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for start in tqdm(range(0, len(order), 256), desc=f"writing {path}"):
                for pixels in pool.map(load, order[start : start + 256]):
                    member.write(pixels.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels[order])


def append_results(path: Path, results: dict[str, Any], again: bool) -> dict[str, Any]:
    """Append a line to a ``results.jsonl``, which is whole at any moment; returns what the last line holds.

    Damaged lines are put aside.

    Args:
        again: whether the last line may be of this evaluation already; it is kept then.
    """
    results = json.loads(json.dumps(results))
    earlier = read_json_lines(path, put_aside=True)
    if again and earlier:
        last = earlier[-1]
        if all(last.get(key) == value for key, value in results.items() if key not in MEASURED_ANEW):
            return last
    with atomic_write(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in [*earlier, results]).encode())
    return results


def describe_environment(dist: Dist) -> dict[str, Any]:
    """Machine, processes and versions, for the results; None for a package that is not installed."""
    cuda = dist.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(dist.device) if cuda else platform.processor() or platform.machine(),
        "device_type": dist.device.type,
        "world_size": dist.world_size,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
