"""A trained model from Python: classes in, pictures out.

generator = ImageGenerator("runs/demo/lpd/checkpoint-last.pth", "runs/demo/tokenizer/tokenizer.pt")
for number, picture in enumerate(generator([3, 1, 4], steps=16, cfg=4.0)):
    picture.save(f"{number}.png")

:meth:`ImageGenerator.generate` gives the codes and orders of the pictures too, so that :mod:`engine.watch` can show how
they came about; :mod:`engine.editing.edit` changes parts of pictures.

Shape legend: `B` pictures, `L` tokens of one, `H` `W` pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.class_names import class_names, find_class
from engine.decoding.decoder import Decoder
from engine.decoding.latency import synchronize
from engine.hub.remote import choose_tokenizer, choose_weights, find_file, own_tokenizer
from engine.model_choice import check_tokenizer, load_pretrained, recorded_config
from models import config_of_weights
from models.lpd import LPD, load_weights
from models.sampling import Sampling, image_seeds
from orders.config import OrderConfig
from orders.draw import Orders
from orders.schedule import default_steps
from tokenizers import exact_precision, load_tokenizer
from util.checkpoint import LAST
from util.crop import center_crop_arr
from util.dist import resolve_device
from util.errors import UserError, about, reading
from util.files import sha256
from util.pictures import to_float, to_uint8
from util.readers import read_json
from util.shapes import shapes_only

TRAIN_SETTINGS = "train_settings.json"  # that a training leaves beside its checkpoints
_DEMO = Path("runs/demo")
SHIPPED = Path(__file__).parents[1] / "pretrained" / "produce"


@dataclass(frozen=True)
class Generated:
    """Pictures with what made them, on the host.

    Attributes:
        codes: int64 (B, L) in raster order.
        images: uint8 (B, H, W, 3).
        orders: int64 (B, L), the cells of each in generation order, known ones first.
        group_sizes: tokens per step, summing to L; with known codes the first group is these.
        known: how many codes were known beforehand; 0 where all were generated.
        seconds: of decoding them all, pixels included.
    """

    codes: Tensor
    images: np.ndarray
    orders: np.ndarray
    group_sizes: tuple[int, ...]
    known: int
    seconds: float

    @property
    def pictures(self) -> list[Image.Image]:
        return [Image.fromarray(pixels) for pixels in self.images]


class ImageGenerator:
    """A model with its tokenizer, on one device.

    Args:
        checkpoint: a checkpoint (the released ones too), an exported folder, or `user/model` on the hub; None for the
            model of the demo, where it was trained in this folder.
        tokenizer: a file, a folder or a name likewise. None: the exported folder's own, or the one that the settings
            beside the checkpoint name.
        bf16: bfloat16 autocast; None: on a GPU.

    Raises:
        UserError: for a file that is missing or damaged, or not what it should be.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        tokenizer: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        use_ema: bool = False,
        bf16: bool | None = None,
    ) -> None:
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.bf16 = self.device.type == "cuda" if bf16 is None else bf16
        self.source = default_checkpoint() if checkpoint is None else Path(checkpoint)
        weights = find_file(self.source, choose_weights)
        content = load_pretrained(weights, use_ema)
        tokenizer_file = find_file(
            _tokenizer_of(self.source) if tokenizer is None else Path(tokenizer), choose_tokenizer
        )
        self.tokenizer = load_tokenizer(tokenizer_file, self.device)
        check_tokenizer(content, weights, sha256(tokenizer_file))
        self.paths = {"pretrained_ckpt": weights, "vqgan_path": tokenizer_file}
        config = recorded_config(content, weights) or config_of_weights(content["model"], self.tokenizer.stride)
        for name, own, needed in (
            ("stride", self.tokenizer.stride, config.stride),
            ("codes", self.tokenizer.config.codebook_size, config.vocab_size),
        ):
            if own != needed:
                raise UserError(f"{tokenizer_file} has {name} {own}, but the model of {weights} needs {needed}.")
        with shapes_only():
            model = LPD(config)
        load_weights(model, content["model"], str(weights))
        self.model = model.to(self.device).eval()
        self.classes = class_names(model.config, content.get("classes"))
        self._decoder: tuple[Any, Decoder] | None = None

    def files(self) -> dict[str, dict[str, str]]:
        """Path and SHA-256 of weights and tokenizer, as the results of an evaluation have them."""
        return {name: {"path": str(path), "sha256": sha256(path)} for name, path in self.paths.items()}

    def __call__(
        self,
        classes: Sequence[int | str],
        steps: int | None = None,
        *,
        order: str = "lpd",
        seed: int = 0,
        **sampling: Any,
    ) -> list[Image.Image]:
        """One picture for each class, given by number or by name: the pictures of :meth:`generate`."""
        return self.generate(classes, steps, order=order, seed=seed, **sampling).pictures

    def generate(
        self,
        classes: Sequence[int | str],
        steps: int | None = None,
        *,
        order: str = "lpd",
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        path: str = "plain",
        **sampling: Any,
    ) -> Generated:
        """One picture for each class, given by number or by name.

        Args:
            steps: decoding steps; None: those of the published results on this grid.
            order: kind of the generation orders.
            seed: picture i has the order and the draws of image i of an evaluation with this seed.
            numbers: the i of each picture, 0, 1, … where it is None: a long run is made in batches.
            path: decode path, see :class:`engine.decoding.decoder.Decoder`. Others than `plain` are worth their
                preparation for many batches of one size, of which the last is kept.
            sampling: settings of :class:`models.sampling.Sampling`, such as ``cfg=4.0``.

        Raises:
            UserError: for a class that the model does not have, or a setting out of its range.
        """
        grid, drawn = self.model.config.grid_size, Sampling(**sampling)
        steps = default_steps(grid) if steps is None else steps
        orders = OrderConfig(order=order, generation_steps=steps).for_grid(grid, seed)
        labels = [self.find_class(name) for name in classes]
        return self.decode(labels, orders, range(len(labels)) if numbers is None else numbers, seed, drawn, path)

    def decode(
        self,
        labels: Sequence[int] | None,
        orders: Orders,
        numbers: Sequence[int],
        seed: int,
        sampling: Sampling,
        path: str = "plain",
        codes: Tensor | None = None,
    ) -> Generated:
        """The pictures with these numbers, of these orders.

        Args:
            labels: the class of each, or None to decode without (then `sampling.cfg` must be 1).
            codes: int64 (B, L), of which those of `orders.spec.known` cells are kept; None where there are none.

        Raises:
            UserError: for a setting or a code out of its range.
        """
        rows = torch.from_numpy(orders.of_images(numbers).astype(np.int64))
        seeds = image_seeds(seed, torch.tensor(list(numbers)))
        key = orders.group_sizes, sampling, len(rows), path, labels is not None, codes is not None
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = None  # its memory is free for the next one
            decoder = Decoder(
                self.model, orders.group_sizes, sampling, len(rows), tokenizer=self.tokenizer, path=path,
                bf16=self.bf16, with_class=labels is not None, with_known=codes is not None,
            )  # fmt: skip
            self._decoder = key, decoder
        decoder = self._decoder[1]
        start = time.perf_counter()
        decoded = decoder(None if labels is None else torch.tensor(list(labels)), rows, seeds, codes)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        assert decoded.images is not None
        known = len(orders.spec.known)
        images = decoded.images.cpu().numpy()
        return Generated(decoded.codes.cpu(), images, rows.numpy(), orders.group_sizes, known, seconds)

    def encode(self, picture: Image.Image) -> Tensor:
        """The codes int64 (L,) of a picture of any size and kind, of which the middle is taken.

        Raises:
            UserError: for one that is smaller than the model's pictures.
        """
        pixels = torch.from_numpy(np.array(self.crop(picture)))[None].to(self.device)
        with torch.inference_mode(), exact_precision():
            return self.tokenizer.encode(to_float(pixels))[0].cpu()

    def crop(self, picture: Image.Image) -> Image.Image:
        """The middle of a picture, RGB, of the size of the model's; see :meth:`encode`."""
        size = self.model.config.img_size
        if min(picture.size) < size:
            width, height = picture.size
            raise UserError(
                f"the picture has {width}×{height} pixels, fewer than the model's {size}×{size}; enlarge it."
            )
        return center_crop_arr(picture.convert("RGB"), size)

    def decode_pixels(self, codes: Tensor) -> np.ndarray:
        """The pictures uint8 (B, H, W, 3) of codes (B, L), or (B, h, w) of a grid of any size."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return to_uint8(self.tokenizer.decode(codes.to(self.device))).cpu().numpy()

    def find_class(self, name: int | str) -> int:
        """The number of a class given by name or number; UserError, with the nearest names, for an unknown one."""
        with about(self.source):  # which may be one that the user didn't name
            return find_class(name, self.classes, self.model.config.class_num)


def default_checkpoint() -> Path:
    """The demo's model where it was trained in this folder, else the one that ships with the project.

    UserError, saying what to run, where neither is there.
    """
    demo = _DEMO / "lpd" / LAST
    found = next((path for path in (demo, SHIPPED) if path.exists()), None)
    if found is None:
        raise UserError(
            f"no model is named, and there is none at {demo} or {SHIPPED}: bash scripts/demo.sh trains the demo's in "
            "minutes, python -m engine.hub download lpd_l_256 vq_ds16_c2i fetches a released one; name it by "
            "--pretrained_ckpt."
        )
    return found


def _tokenizer_of(checkpoint: Path) -> Path:
    """Where the tokenizer of a model is: in its folder, or as the settings of its training say."""
    own = own_tokenizer(checkpoint)
    settings = checkpoint.with_name(TRAIN_SETTINGS)
    if own is None and settings.is_file():
        with reading("settings of the training", settings):
            named = read_json("settings of the training", settings)["settings"]["vqgan_path"]
            own = None if named is None or not Path(named).exists() else Path(named)
    if own is None:
        raise UserError(f"{checkpoint} has no tokenizer beside it: name its file (--vqgan_path).")
    return own
