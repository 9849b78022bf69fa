"""Signals ask a training to stop, and its exit status says what a launcher should do."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from engine.training.stop import READ_BACK_DELAY, StopRequest, exit_when_told
from tests.helpers.processes import ALONE
from util.dist import Dist
from util.signals import REQUEUE_STATUS, exit_status


def test_stop_request_restores_handlers_and_second_ctrl_c_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)

    def press_ctrl_c_twice() -> None:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c_twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_exit_statuses_and_signals_outside_the_loop() -> None:
    """75 asks the launcher to requeue; it would be wrong for Ctrl-C."""
    assert [exit_status(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)] == [75] * 3
    assert (exit_status(signal.SIGINT), REQUEUE_STATUS) == (130, 75)
    before = signal.getsignal(signal.SIGTERM)

    def tell_again() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:  # `timeout` sends it twice: what is put in order is not interrupted
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as caught, exit_when_told():
        tell_again()
    assert caught.value.__context__ is None
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_further_signals_while_saving_change_nothing() -> None:
    """A launcher repeats SIGTERM; only a second Ctrl-C is a person who doesn't want to wait."""
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.agreed(ALONE)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.gpu
def test_processes_on_gpus_agree_without_waiting_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes from some steps before, the same for all, and a request is never lost."""
    monkeypatch.setattr(Dist, "sum_", lambda self, tensor: tensor)
    dist, stop = Dist(0, 2, torch.device("cuda", 0)), StopRequest()
    answers = [stop.agreed(dist) for _ in range(4)]
    stop.signal = 15
    answers += [stop.agreed(dist) for _ in range(4)]
    assert answers == [False] * (4 + READ_BACK_DELAY) + [True] * (4 - READ_BACK_DELAY)
