"""``python -m scripts.app``: a page for the browser to generate, watch and edit pictures, and to look at orders.

Without a checkpoint it opens with the demo's model. Needs the package gradio.
"""

from __future__ import annotations

from engine.app.server import ServerConfig, require_gradio, serve
from engine.image_generator import ImageGenerator
from util.cli import Parser, exit_on_user_error, from_args
from util.dist import DeviceConfig


def main() -> None:
    parser = Parser(prog="python -m scripts.app", description="A page for the browser: generate, watch, edit, orders.")
    parser.add_argument(
        "--pretrained_ckpt", help="checkpoint, exported folder, or a name on the hub (default: the demo's model)"
    )
    parser.add_argument("--vqgan_path", help="its tokenizer (default: the exported folder's, or its training's)")
    parser.add_argument("--use_ema", action="store_true", help="the moving average of the weights")
    parser.add_config(ServerConfig)
    parser.add_config(DeviceConfig)
    args = parser.parse_args()
    config = from_args(ServerConfig, args)
    require_gradio()
    config.require_free()
    serve(ImageGenerator(args.pretrained_ckpt, args.vqgan_path, device=args.device, use_ema=args.use_ema), config)


if __name__ == "__main__":
    exit_on_user_error(main)
