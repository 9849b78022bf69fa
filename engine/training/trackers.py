"""Where the figures and pictures of a run go besides its folder: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from util.config import setting
from util.errors import UserError
from util.files import atomic_write


class Tracker(Protocol):
    """Takes what a run reports; `step` counts the steps done."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def picture(self, name: str, image: Image.Image, step: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TrackerConfig:
    """Which trackers a run has."""

    tensorboard: bool = setting(False, "write event files for TensorBoard into the output folder")
    use_wandb: bool = setting(False, "log to Weights & Biases as well")
    wandb_project: str = setting("lpd", "where --use_wandb logs to")
    wandb_run_name: str | None = setting(None, "(default: the name of the output folder)")

    def require_packages(self) -> None:
        """Raise UserError where a package is missing."""
        for flag, package in (("tensorboard", "tensorboard"), ("use_wandb", "wandb")):
            if getattr(self, flag) and importlib.util.find_spec(package) is None:
                raise UserError(f"--{flag} needs the package {package}; install it with: pip install {package}.")

    def open(self, folder: Path, start_step: int, record: dict[str, Any]) -> list[Tracker]:
        """The trackers of a run that writes to `folder`; `record` is what it keeps of its flags."""
        trackers: list[Tracker] = []
        if self.tensorboard:
            trackers.append(TensorBoard(folder, start_step))
        if self.use_wandb:
            name = self.wandb_run_name or folder.name
            trackers.append(WeightsAndBiases(folder, start_step, self.wandb_project, name, record))
        return trackers


class TensorBoard:
    """Event files in `<folder>/tensorboard`; what a killed run wrote after its last checkpoint is not shown."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1 if start_step else None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; a resumed run stays the same one, whose id is in `<folder>/wandb_run_id`."""

    def __init__(self, folder: Path, start_step: int, project: str, name: str, record: dict[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_run_id"
        resumed = start_step > 0 and id_file.is_file()
        run_id = id_file.read_text().strip() if resumed else uuid.uuid4().hex[:16]
        self._picture = wandb.Image
        try:
            self._run = wandb.init(project=project, name=name, id=run_id, resume="allow", config=record, dir=folder)
        except Exception as error:  # not logged in, no network: its own kinds of errors
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"--use_wandb: Weights & Biases doesn't start ({reason}); run wandb login, or set WANDB_MODE=offline."
            ) from None
        with atomic_write(id_file) as file:
            file.write(f"{run_id}\n".encode())

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self._run.log({name: self._picture(image)}, step=step)

    def close(self) -> None:
        self._run.finish()
