"""Flags of the published commands that mean nothing here, where several commands share them."""

from __future__ import annotations

from util.cli import Parser


def add_unused_tokenizer_flags(parser: Parser) -> None:
    """Accept the published flags that repeat what the tokenizer's file says."""
    parser.add_unused(
        "--vqgan_stride", "--vqgan_vocab_size", instead="stride and number of codes are those of --vqgan_path"
    )


def add_unused_process_flags(parser: Parser) -> None:
    """Accept the published flags of pinned memory and distributed processes."""
    parser.add_unused(
        "--pin_mem", "--no_pin_mem", takes_value=False, instead="memory is pinned where a GPU is used, and only there"
    )
    processes = "torchrun tells each process its rank and how many there are"
    parser.add_unused("--world_size", "--local_rank", "--dist_url", instead=processes)
    parser.add_unused("--dist_on_itp", takes_value=False, instead=processes)
