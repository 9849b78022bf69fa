"""The demo's data: the handwritten digits that ship with scikit-learn, written out as an image folder.

1,797 scans of 8×8 pixels in 17 grey levels (Alpaydin & Kaynak, UCI Optical Recognition of Handwritten Digits),
enlarged to 32×32. `train/` and `test/` hold one folder per digit; every fifth scan of a digit is test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from util.cli import Parser

IMG_SIZE = 32


def write_digits(folder: Path) -> None:
    """Write `folder/{train,test}/<digit>/<number>.png`, RGB, 32×32."""
    digits = load_digits()
    seen = dict.fromkeys(range(10), 0)
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        seen[digit] += 1
        split = "test" if seen[digit] % 5 == 0 else "train"
        grey = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))
        path = folder / split / str(digit) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC).convert("RGB").save(path)


if __name__ == "__main__":
    parser = Parser(prog="python -m scripts.digits", description=__doc__)
    parser.add_argument("folder", type=Path, help="where train/ and test/ go")
    write_digits(parser.parse_args().folder)
