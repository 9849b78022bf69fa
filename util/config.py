"""Configurations: frozen dataclasses in which each setting of the project stands once.

A field made by :func:`setting` carries its help text and its range. The flags of the commands (:mod:`util.cli`), the
checks on construction and the JSON records all follow from the fields. A field whose type is such a dataclass is a part
of the configuration (made by :func:`part`); flags and records are flat, so names are unique over all parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from util.errors import refuse

# The largest that settings may be: beyond them a number is a mistake, which would be noticed after long work.
MAX_SIDE = 2**13  # pixels of a picture
MAX_WORKERS = 1024  # processes, threads
MAX_COUNT = 2**24  # classes, codes, widths
MAX_NUMBER = 1e30  # far enough below the largest float32


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    parse: Callable[[str], Any] | None = None,
    note: str = "",
    aliases: Sequence[str] = (),
) -> Any:
    """A field with help text.

    Args:
        default: its value where none is given; without one the setting is required.
        at_least, above, at_most, below: its range, None where it is open. Floats are at most 1e30 in any case.
        choices: the strings it may be.
        parse: what turns the text of a flag into the value, where the type of the field does not do.
        note: what messages about a value out of range add.
        aliases: other names of the flag, such as "-N".
    """
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {"help": help, "limits": limits, "choices": tuple(choices), "parse": parse, "note": note}
    metadata["aliases"] = tuple(aliases)
    return dataclasses.field(default=default, metadata=metadata)


def part(title: str = "", description: str = "", default_factory: Any = MISSING) -> Any:
    """A field that is a configuration itself; `title` and `description` head its flags in ``--help``."""
    return dataclasses.field(default_factory=default_factory, metadata={"title": title, "description": description})


def settings_of(config: Any) -> Iterator[Field[Any]]:
    """Every setting of a configuration or its class, without its parts."""
    return (field for field in dataclasses.fields(config) if "help" in field.metadata)


def parts_of(config: Any) -> Iterator[tuple[Field[Any], type]]:
    """(field, class) of every part of a configuration or its class."""
    for field in dataclasses.fields(config):
        if "title" in field.metadata:
            yield field, value_type(config, field)[0]


def value_type(config: Any, field: Field[Any]) -> tuple[type, bool]:
    """The type of a field's value (that of X for ``X | None``), or of its elements and True for ``tuple[X, ...]``."""
    hint = get_type_hints(config if isinstance(config, type) else type(config))[field.name]
    hint = next((kind for kind in get_args(hint) if kind is not NoneType), hint) if NoneType in get_args(hint) else hint
    return (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)


def check(config: Any, prefix: str = "--") -> None:
    """Raise UserError for all settings, or elements of one, out of their range. For ``__post_init__``.

    Args:
        prefix: what stands before the name in messages: "" where the configuration belongs to a library.
    """
    refuse(
        [
            problem
            for field in settings_of(config)
            for problem in problems_of(f"{prefix}{field.name}", getattr(config, field.name), field.metadata)
        ]
    )


def problems_of(name: str, value: Any, given: Mapping[str, Any]) -> list[str]:
    """A sentence for the value, or each element of it, that is out of the range of a setting; ``given``: its metadata.

    None is never out of range.
    """
    values = value if isinstance(value, tuple | list) else (value,)
    problems = [_problem_of(name, one, given) for one in values if one is not None]
    return [problem for problem in problems if problem is not None]


def _problem_of(name: str, value: Any, given: Mapping[str, Any]) -> str | None:
    if given["choices"] and value not in given["choices"]:
        return f"{name} is {value!r}; choose one of {', '.join(given['choices'])}."
    limits = {words: limit for words, limit in given["limits"].items() if limit is not None}
    within = {
        "at least": lambda limit: value >= limit,
        "above": lambda limit: value > limit,
        "at most": lambda limit: value <= limit,
        "below": lambda limit: value < limit,
    }
    too_large = isinstance(value, float) and not abs(value) <= MAX_NUMBER  # not a number either
    if not too_large and all(within[words](limit) for words, limit in limits.items()):
        return None
    if too_large:
        limits |= {} if limits.keys() & {"at least", "above"} else {"at least": -MAX_NUMBER}
        limits |= {} if limits.keys() & {"at most", "below"} else {"at most": MAX_NUMBER}
    wanted = " and ".join(f"{words} {_figure(limit)}" for words, limit in limits.items())
    note = f" ({given['note']})" if given["note"] else ""
    return f"{name} is {value}; it must be {wanted}{note}."


def _figure(limit: float) -> str:
    return f"2^{limit.bit_length() - 1}" if isinstance(limit, int) and limit >= 2**20 else f"{limit:g}"


def names(*classes: type) -> tuple[str, ...]:
    """The names of all settings of configurations, parts included."""
    own = [field.name for cls in classes for field in settings_of(cls)]
    return (*own, *(name for cls in classes for _, kind in parts_of(cls) for name in names(kind)))


def record(config: Any) -> dict[str, Any]:
    """All settings, parts included, as one flat dict of plain data."""
    values: dict[str, Any] = {field.name: _plain(getattr(config, field.name)) for field in settings_of(config)}
    for field, _ in parts_of(config):
        if getattr(config, field.name) is not None:
            values |= {name: value for name, value in record(getattr(config, field.name)).items() if name not in values}
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
