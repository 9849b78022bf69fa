"""The report of this experiment, and the command that makes it again:

python -m experiments.cifar10.report RUN/report [--publish NAME]
"""

from __future__ import annotations

from experiments.cifar10.page import page, plot
from experiments.reports import Report
from util.cli import exit_on_user_error

REPORT = Report("cifar10", page, plot, samples=(256,))

if __name__ == "__main__":
    exit_on_user_error(REPORT.main)
