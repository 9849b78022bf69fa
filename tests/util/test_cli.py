"""How commands end on an error."""

from __future__ import annotations

import pytest
import torch.distributed as torch_dist

from util.cli import exit_on_user_error
from util.errors import UserError


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("--x is 1."), 2), (FloatingPointError("nan"), 1), (OSError(28, "full"), 1), (KeyboardInterrupt(), 130)],
)
def test_the_same_sentence_is_printed_by_one_process_of_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    """Eight GPUs used to say everything eight times; but what only one of them knows must be said."""

    def fail() -> None:
        raise error

    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as caught:
            exit_on_user_error(fail)
        assert caught.value.code == status
    assert len(capsys.readouterr().err.splitlines()) == 1
    error.args = ("something else",)
    monkeypatch.delenv("MASTER_PORT")  # nobody to ask: better twice than never
    with pytest.raises(SystemExit):
        exit_on_user_error(fail)
    assert len(capsys.readouterr().err.splitlines()) == 1
