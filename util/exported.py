"""The form in which models are shared: `model.safetensors` with a `config.json` beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from util.errors import UserError

MODEL, CONFIG = "model.safetensors", "config.json"
FORMAT, FORMAT_VERSION = "lpd", 1


def read_config(weights: Path) -> dict[str, Any]:
    """What the `config.json` beside a `model.safetensors` says: `config`, `classes` and `tokenizer_sha256`.

    Empty for files of other names, and where the `config.json` is another project's.

    Raises:
        UserError: if it has another format version, or is damaged.
    """
    path = weights.with_name(CONFIG)
    if weights.name != MODEL or not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error}).") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return {}
    if values.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {values.get('format_version')}; this code reads version {FORMAT_VERSION}."
        )
    config, classes, tokenizer = (values.get(key) for key in ("config", "classes", "tokenizer_sha256"))
    numbers = isinstance(config, dict) and all(isinstance(value, int | float) for value in config.values())
    names = classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))
    if not numbers or not names or not isinstance(tokenizer, str | None):
        raise UserError(f"{path} does not describe a model: 'config', 'classes' or 'tokenizer_sha256' is damaged.")
    return {"config": config, "classes": classes, "tokenizer_sha256": tokenizer}
