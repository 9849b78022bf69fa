"""Training of tokenizers on images; the command is ``python -m tokenizers.train``."""
