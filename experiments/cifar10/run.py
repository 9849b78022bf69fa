"""Does it hold on real photographs? Trains everything from scratch on 32×32 photos and compares generation orders.

    python -m experiments.cifar10.run --data photos.npz --output_dir runs/cifar10

What is finished is not done again: after an interruption, or when --time_limit has ended a call, the same command
resumes.
"""

from __future__ import annotations

from experiments.cifar10.report import REPORT
from experiments.cifar10.scales import SCALES
from experiments.driver import Experiment
from util.cli import exit_on_user_error

EXPERIMENT = Experiment(REPORT, SCALES, __doc__, classes=10, photos=50_000)

if __name__ == "__main__":
    exit_on_user_error(EXPERIMENT.main)
