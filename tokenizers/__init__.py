"""VQ tokenizers: images ↔ grids of code indices."""

from tokenizers.checkpoint import load_tokenizer, save_tokenizer
from tokenizers.vq_model import VQConfig, VQModel

__all__ = ["VQConfig", "VQModel", "load_tokenizer", "save_tokenizer"]
