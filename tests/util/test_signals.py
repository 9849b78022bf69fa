"""Stop signals that come at a bad moment."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.commands import ROOT

TOLD_WHILE_WRITING = """
import io, os, signal, sys
from tqdm import tqdm
from util.logger import setup_logging
from util.signals import StopSignal

class Told(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        if stop.signal is None:
            signal.raise_signal(signal.SIGTERM)
        return os.write(2, bytes(data))

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Told()), line_buffering=True)
setup_logging()
with StopSignal() as stop:
    for _ in tqdm(range(3), mininterval=0):
        pass
print(signal.Signals(stop.signal).name)
"""


def test_a_signal_in_the_middle_of_writing_a_progress_bar_is_kept() -> None:
    """Guards against a traceback in the place of the last save: its message can't be written at that moment."""
    found = subprocess.run([sys.executable, "-c", TOLD_WHILE_WRITING], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "SIGTERM\n"), found.stderr
