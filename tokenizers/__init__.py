"""VQ tokenizers: images ↔ grids of code indices."""

from tokenizers.checkpoint import load_tokenizer, log_quality, picture_size, read_quality, save_tokenizer
from tokenizers.vq_model import VQConfig, VQModel, exact_precision

__all__ = [
    "VQConfig",
    "VQModel",
    "exact_precision",
    "load_tokenizer",
    "log_quality",
    "picture_size",
    "read_quality",
    "save_tokenizer",
]
