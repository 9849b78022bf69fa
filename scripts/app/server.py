"""Serving the page until a signal stops it; what it wrote is removed then."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from engine.image_generator import ImageGenerator
from scripts.app.handlers import Handlers
from scripts.app.uploads import MAX_BYTES
from util.config import check, setting
from util.errors import UserError, reason_of

_SESSIONS = 16  # whose pictures are kept in memory


@dataclass(frozen=True)
class ServerConfig:
    """Where the page is."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 lets everybody in who reaches this machine")
    port: int = setting(7860, "port to listen on", at_least=1, at_most=65535)

    def __post_init__(self) -> None:
        check(self)

    def require_free(self) -> None:
        """Raise UserError where nobody can listen there."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((self.host, self.port))
                trial.listen()
            except (OSError, UnicodeError) as error:  # the latter of names that can be none
                reason = getattr(error, "strerror", None) or reason_of(error)
                raise UserError(
                    f"port {self.port} of {self.host} cannot be used ({reason}); name a free one by --port."
                ) from None


def require_gradio() -> None:
    """Raise UserError where the package is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs the package gradio; install it with: pip install 'gradio>=6.31,<7'.")


def serve(generator: ImageGenerator, config: ServerConfig) -> None:
    """Serve the page of a model until SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with tempfile.TemporaryDirectory(prefix="lpd_app_", ignore_cleanup_errors=True) as folder:
        # Read when gradio is imported.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        from scripts.app.page import CSS, THEME, build

        page = build(Handlers(generator), Path(folder))
        page.launch(
            server_name=config.host,
            server_port=config.port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MAX_BYTES,
            state_session_capacity=_SESSIONS,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=THEME,
            css=CSS,
        )
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"http://{host}:{config.port} shows the page; Ctrl-C stops it.", flush=True)
        stopped.wait()
        page.close(verbose=False)
