"""The report of this experiment, and the command that makes it again:

python -m experiments.produce.report RUN/report [--publish NAME]
"""

from __future__ import annotations

from experiments.produce.page import page, plot
from experiments.reports import Report
from util.cli import exit_on_user_error

REPORT = Report("produce", page, plot)

if __name__ == "__main__":
    exit_on_user_error(REPORT.main)
