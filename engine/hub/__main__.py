"""``python -m engine.hub``: get the published files, and share a trained model on the Hugging Face hub.

    python -m engine.hub download lpd_l_256 vq_ds16_c2i inception
    python -m engine.hub export runs/mine/checkpoint-last.pth exported --vqgan_path runs/tokenizer/tokenizer.pt
    python -m engine.hub push exported user/model

An exported model is a folder with `model.safetensors`, `config.json` and a model card; `--pretrained_ckpt` takes the
folder, or its name on the hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.hub.download import NAMES, download_all
from engine.hub.export import export, push
from util.cli import Parser, exit_on_user_error
from util.logger import setup_logging


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m engine.hub",
        description="Get the published files, and share a trained model on the Hugging Face hub.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("download", help="the files that recipes need, to where the recipes look for them")
    command.add_argument(
        "names", nargs="+", choices=("all", *NAMES), metavar="NAME", help=f"all (14 GB), or any of {', '.join(NAMES)}"
    )
    command = commands.add_parser("export", help="checkpoint → folder of safetensors and JSON")
    command.add_argument("checkpoint", type=Path, help="checkpoint of a training run")
    command.add_argument("folder", type=Path, help="where to write model.safetensors, config.json and README.md")
    command.add_argument("--ema", action="store_true", help="the moving average of the weights, not the last weights")
    command.add_argument("--vqgan_path", type=Path, help="tokenizer to copy into the folder")
    command.add_argument("--bf16", action="store_true", help="weights of half the size, the tokenizer's too")
    command.add_argument("--notes", type=Path, help="Markdown for the model card: data, licence, training, scores")
    command = commands.add_parser("push", help="exported folder → hub")
    command.add_argument("folder", type=Path, help="an exported folder")
    command.add_argument("repo", help="name on the hub: user/model")
    command.add_argument("--private", action="store_true", help="if the repository is new, make it private")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    setup_logging()
    if args.command == "download":
        download_all(args.names)
    elif args.command == "export":
        export(args.checkpoint, args.folder, ema=args.ema, vqgan_path=args.vqgan_path, bf16=args.bf16, notes=args.notes)
    else:
        print(push(args.folder, args.repo, args.private))


if __name__ == "__main__":
    exit_on_user_error(main)
