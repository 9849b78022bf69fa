"""Make a code cache for training.

python main_cache.py --img_size 256 --vqgan_path vq_ds16_c2i.pt --data_path imagenet/train --cached_path cached
torchrun --nproc_per_node=8 main_cache.py …the same flags…
"""

from __future__ import annotations

from engine.cache import CacheConfig, build_cache
from engine.published_flags import add_unused_process_flags, add_unused_tokenizer_flags
from util.cli import Parser, exit_on_user_error, from_args
from util.dist import distributed
from util.logger import setup_logging


def main() -> None:
    parser = Parser(
        description="Cache the tokenizer's codes of images, once plain and once mirrored, for training. A killed run "
        "is resumed by the same command, with any number of processes; to a finished one new images are added."
    )
    parser.add_config(CacheConfig)
    add_unused_tokenizer_flags(parser)
    parser.add_unused("--seed", instead="the codes follow from the images and the tokenizer, nothing is drawn")
    add_unused_process_flags(parser)
    config = from_args(CacheConfig, parser.parse_args())
    with distributed(config.device) as dist:
        setup_logging(dist.rank)
        build_cache(config, dist)


if __name__ == "__main__":
    exit_on_user_error(main)
