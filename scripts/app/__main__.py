"""``python -m scripts.app``: a page for the browser to generate, watch and edit pictures, and to look at orders.

Without a checkpoint it opens with the demo's model, or the one that ships with the project. Needs the package gradio.
"""

from __future__ import annotations

from scripts.app.server import ServerConfig, require_gradio, serve
from scripts.picture_flags import GeneratorConfig
from util.cli import Parser, exit_on_user_error, from_args


def main() -> None:
    parser = Parser(prog="python -m scripts.app", description="A page for the browser: generate, watch, edit, orders.")
    parser.add_config(GeneratorConfig)
    parser.add_config(ServerConfig)
    args = parser.parse_args()
    model, server = from_args(GeneratorConfig, args), from_args(ServerConfig, args)
    require_gradio()
    server.require_free()
    serve(model.open_generator(), server)


if __name__ == "__main__":
    exit_on_user_error(main)
