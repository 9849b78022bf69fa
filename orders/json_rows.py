"""JSON files that hold a list of lists of integers: orders and group sizes, as published."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from util.errors import UserError

_FIRST, _NEXT = re.compile(r"\s*\[\s*(?=\[)"), re.compile(r"\s*,\s*(?=\[)")


def read_rows(path: Path, what: str, expected: str, is_right: Callable[[list[int]], bool]) -> Iterator[list[int]]:
    """The inner lists, one after the other: all numbers of 60,000 orders at once would take 2.5 GB.

    Args:
        what: the name of such files in messages.
        expected: what messages say that a row must be.
        is_right: whether a row of integers is that.

    Raises:
        UserError: naming the file and the row, for anything but a list of such rows.
    """
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist.")
    text = path.read_text("utf-8", errors="replace")
    decode = json.JSONDecoder().raw_decode
    number, position = 0, 0
    between = _FIRST.match(text)
    while between:
        try:
            row, position = decode(text, between.end())
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, list) or set(map(type, row)) - {int} or not is_right(row):
            raise UserError(f"{what} {path}, row {number}: expected {expected}.")
        yield row
        number += 1
        between = _NEXT.match(text, position)
    if "".join(text[position:].split()) != ("]" if number else "[]"):
        raise UserError(f"{what} {path} is cut short, or not a JSON list of lists, after {number} rows.")
