"""Damage to files: bytes that flip, files cut short or swapped, and whole files of odd content."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

Damage = Callable[[Path, random.Random], None]

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3.5,
    1e308,
    float("nan"),
    10**30,
    "",
    "3",
    "x" * 300,
    [],
    [[]],
    {},
    {"a": [1]},
    "\u0000",
)
FOREIGN = {
    "empty": b"",
    "text": b"this is no such file\n",
    "page": b"<!DOCTYPE html><html><body>404: not found</body></html>",
    "zip of nothing": b"PK\x05\x06" + bytes(18),
    "deep JSON": b"[" * 200_000,
    "wide JSON": b'{"a": ' * 50 + b"1" + b"}" * 50,
    "number": b"12345678901234567890123456789012345678901234567890",
    "NULs": bytes(4096),
    "latin-1": "caf\u00e9\n".encode("latin-1") * 20,
}


def flip(path: Path, rng: random.Random) -> None:
    """Up to eight bits anywhere."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_head(path: Path, rng: random.Random) -> None:
    """A byte of the first or last 128, where formats say what they are."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(min(128, len(data)))
    data[place if rng.random() < 0.5 else -1 - place] = rng.randrange(256)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.choice((1, path.stat().st_size // 2, max(0, path.stat().st_size - rng.randint(1, 64)))))


def blank(path: Path, rng: random.Random) -> None:
    """A block of zeros, as after a crash of a file system."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def append(path: Path, rng: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.randbytes(100))


def foreign(path: Path, rng: random.Random) -> None:
    path.write_bytes(FOREIGN[rng.choice(sorted(FOREIGN))])


def swap(path: Path, rng: random.Random) -> None:
    """Another of the inputs in its place."""
    names = ("sizes.json", "codes/header.json", "codes/codes.npy", "tokenizer.pt", "reference.npz", "orders.json")
    root = next(folder for folder in path.parents if folder.name == "case") / "inputs"
    path.write_bytes((root / rng.choice([name for name in names if root / name != path])).read_bytes())


def replace(path: Path, rng: random.Random) -> None:
    """What is no file in its place."""
    path.unlink()
    kinds = ["folder", "pipe", "link to nothing", "link to itself", "device"]
    if "pictures" not in path.parts and "published" not in path.parts:  # a data set of fewer images is another one
        kinds.append("nothing")
    kind = rng.choice(kinds)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"link to nothing": "nowhere", "link to itself": path.name, "device": "/dev/zero"}[kind])


def odd_json(path: Path, rng: random.Random) -> None:
    """One value of another type, a name too many, or one missing; of a file of lines in one of them."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(len(lines))
    lines[number] = json.dumps(_with_odd_value(json.loads(lines[number]), rng))
    path.write_text("\n".join(lines) + "\n")


def odd_torch(path: Path, rng: random.Random) -> None:
    """A file of torch whose check sums are right and one of whose values is odd."""
    content = torch.load(path, weights_only=True)
    torch.save(_with_odd_value(content, rng), path)


def odd_tensor(path: Path, rng: random.Random) -> None:
    """A file of torch, or of safetensors, in which one tensor has another kind, shape, or values that aren't finite."""
    plain = path.suffix == ".safetensors"
    content = safetensors.torch.load_file(path) if plain else torch.load(path, weights_only=True)
    state = content if plain else content["model"]
    name = rng.choice(sorted(state))
    state[name] = rng.choice(_odd_tensors(state[name], plain))
    safetensors.torch.save_file(content, path) if plain else torch.save(content, path)


def _odd_tensors(tensor: torch.Tensor, plain: bool) -> list[torch.Tensor]:
    odd = [
        torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor - 10**6,
        tensor.flatten()[:-1].clone(),
        tensor.unsqueeze(0).clone(),
        torch.empty(0),
        tensor.bool(),
    ]
    huge = torch.zeros(1).as_strided((10**12,), (0,))  # claims 4 TB
    return odd if plain else [*odd, huge, tensor.to(torch.complex64), tensor.to("meta"), torch.eye(3).to_sparse()]


def odd_array(path: Path, rng: random.Random) -> None:
    """An ``.npy`` or ``.npz`` file in which one array has another type or shape, or claims terabytes."""
    if path.suffix == ".npy":
        path.write_bytes(_odd_array(np.load(path), rng))
        return
    import zipfile

    with np.load(path) as file:
        arrays = {name: file[name] for name in file}
    chosen, dropped = rng.choice(sorted(arrays)), rng.random() < 0.15
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            if name != chosen:
                archive.writestr(f"{name}.npy", _npy(array))
            elif not dropped:
                archive.writestr(f"{name}.npy", _odd_array(array, rng))


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _odd_array(array: np.ndarray, rng: random.Random) -> bytes:
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        claim, {"descr": "<f8", "fortran_order": False, "shape": (rng.choice((2**20, 2**40)), 2**10)}
    )
    numbers = array.dtype.kind in "iuf"
    return rng.choice((
        claim.getvalue() + bytes(100),
        _npy(np.array([None, {}], object)),
        _npy(array[..., :-1] if array.ndim else array),
        _npy(array[None]),
        _npy(np.array("text")),
        _npy(array.astype(np.complex64) if numbers else array),
        _npy(np.full(array.shape, np.nan) if numbers else array),
        _npy(array.astype(np.int64) * 0 - 7 if numbers else array),
        _npy(array.astype(np.int64) * 0 + 2**40 if numbers else array),
    ))  # fmt: skip


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value[:3])
        for key, item in items:
            yield from _leaves(item, (*path, key))


def _with_odd_value(content: Any, rng: random.Random) -> Any:
    places = list(_leaves(content))
    if not places or rng.random() < 0.1:
        return rng.choice(ODD)
    # Those near the root are few and matter most.
    places = [place for place in places if len(place) == rng.choice(sorted({len(place) for place in places}))] or places
    *above, key = rng.choice(places)
    parent = content
    for step in above:
        parent = parent[step]
    if rng.random() < 0.2 and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return content


RAW: tuple[Damage, ...] = (flip, flip, flip_head, cut, blank, append, foreign, foreign, swap, replace)
ODD_OF: dict[str, tuple[Damage, ...]] = {
    ".json": (odd_json,) * 4,
    ".jsonl": (odd_json,) * 3,
    ".settings": (odd_json,) * 2,
    ".pth": (odd_torch, odd_torch, odd_tensor),
    ".pt": (odd_torch, odd_tensor),
    ".safetensors": (odd_tensor,) * 2,
    ".npz": (odd_array,) * 3,
    ".npy": (odd_array,) * 3,
}


def damages_of(path: Path) -> tuple[Damage, ...]:
    """All kinds of damage to a file of this name."""
    return RAW + ODD_OF.get(path.suffix, ())
