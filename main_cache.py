"""Cache the tokenizer's codes of images, once plain and once mirrored, for training.

    python main_cache.py --img_size 256 --vqgan_path vq_ds16_c2i.pt --data_path imagenet/train --cached_path cached
    torchrun --nproc_per_node=8 main_cache.py …the same flags…

A killed run continues when started again, with any number of processes; a finished cache is verified.
"""

from __future__ import annotations

import argparse

from engine.cache import cache_codes, convert_npz
from util.cli import exit_on_user_error
from util.dist import distributed
from util.logger import setup_logging


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img_size", type=int, default=256, help="side of the centre crop in pixels (%(default)s)")
    parser.add_argument("--vqgan_path", required=True, help="tokenizer file, such as vq_ds16_c2i.pt")
    parser.add_argument("--cached_path", required=True, help="folder of the cache, new or to be continued")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_path", help="images: one subfolder per class, or photos.npz:train")
    source.add_argument(
        "--convert_from",
        help="instead of images, a cache with one .npz per image, made with this tokenizer at this size: pack it",
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="images encoded at once per process, at most 256 (%(default)s)"
    )
    parser.add_argument("--num_workers", type=int, default=4, help="reading processes per process (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--skip_broken", action="store_true", help="leave out files that cannot be read and list them")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with distributed(args.device) as dist:
        setup_logging(dist.rank)
        loading = {"num_workers": args.num_workers, "skip_broken": args.skip_broken}
        if args.convert_from:
            convert_npz(args.convert_from, args.cached_path, args.vqgan_path, args.img_size, dist, **loading)
        else:
            loading["batch_size"] = args.batch_size
            cache_codes(args.data_path, args.cached_path, args.vqgan_path, args.img_size, dist, **loading)


if __name__ == "__main__":
    exit_on_user_error(main)
