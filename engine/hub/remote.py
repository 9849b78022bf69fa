"""Files of the Hugging Face hub: downloads resume after an interruption and are checked against the hub's hashes.

``HF_ENDPOINT`` (a mirror), ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE=1`` work as they do for `huggingface_hub`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from huggingface_hub.utils.sha import git_hash

from util.checkpoint import EXPORTED_CONFIG, EXPORTED_MODEL
from util.errors import UserError, reason_of
from util.files import sha256

logger = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer.pt", "tokenizer.safetensors")  # exported with a model
WEIGHTS = (".safetensors", ".pth")
Choice = Callable[[Sequence[str], str], str]  # (names, where they are) → one of them
_REPO = r"[\w-][\w.-]*/[\w-][\w.-]*"
_NAME = re.compile(rf"(?:hf:)?({_REPO})|hf:({_REPO})/(.+)")


class HubUnreachable(UserError):
    """The hub can't be reached. A file in the local cache may be used instead."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository."""

    repo: str
    name: str  # path in the repository
    size: int  # bytes
    digest: str  # the hub's ETag: SHA-256 of a large file, git's SHA-1 of a small one
    repo_type: str = "model"

    def matches(self, path: Path) -> bool:
        """Whether the file at ``path`` has this size and digest."""
        if path.stat().st_size != self.size:
            return False
        if len(self.digest) == 64:
            return sha256(path) == self.digest
        return git_hash(path.read_bytes()) == self.digest


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn whatever goes wrong with the hub into a UserError that starts with ``what``."""
    try:
        yield
    except RepositoryNotFoundError:
        reason = "there is no such repository, or it is shown only after a login (hf auth login)"
        raise UserError(f"{what} ({constants.ENDPOINT}): {reason}.") from None
    except (HFValidationError, HTTPError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else reason_of(error)
        raise HubUnreachable(f"{what} ({constants.ENDPOINT}): {reason}.") from None


def list_files(repo: str, repo_types: Sequence[str] = ("model",)) -> list[RemoteFile]:
    """All files of a repository, sorted by name.

    Args:
        repo_types: kinds of repositories among which the name is looked for, in this order.

    Raises:
        UserError: if there is no such repository; HubUnreachable, if the hub can't be reached.
    """
    with hub_errors(f"can't list the files of {repo}"):
        for repo_type in repo_types:
            try:
                info: Any = HfApi().repo_info(repo, repo_type=repo_type, files_metadata=True, timeout=30)
                break
            except RepositoryNotFoundError:
                if repo_type == repo_types[-1]:
                    raise
    files = [
        RemoteFile(repo, entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, repo_type)
        for entry in info.siblings
    ]
    return sorted(files, key=lambda file: file.name)


def choose_weights(names: Sequence[str], where: str) -> str:
    """The name of the file that holds the model: `model.safetensors`, or the only file of weights.

    Raises:
        UserError: if there is none, or several of other names.
    """
    found = [name for name in names if name.endswith(WEIGHTS) and name not in TOKENIZERS]
    if EXPORTED_MODEL in found:
        return EXPORTED_MODEL
    if len(found) != 1:
        which = f"several, {', '.join(found)}: name the file" if found else "none"
        raise UserError(f"{where} should hold one file of weights ({' or '.join(WEIGHTS)}), but there is {which}.")
    return found[0]


def choose_tokenizer(names: Sequence[str], where: str) -> str:
    """The name of the tokenizer that was exported with a model. UserError if there is none."""
    found = [name for name in TOKENIZERS if name in names]
    if not found:
        raise UserError(f"{where} holds no tokenizer ({' or '.join(TOKENIZERS)}): name its file (--vqgan_path).")
    return found[0]


def find_named(files: Mapping[str, RemoteFile], name: str, repo: str) -> RemoteFile:
    """The file of a repository with this name. UserError if there is none."""
    if name not in files:
        raise UserError(f"{repo} has no file {name}; it holds {', '.join(files) or 'nothing'}.")
    return files[name]


def fetch(
    file: RemoteFile, destination: Path, check: Callable[[Path], object] = lambda path: None, replace: bool = False
) -> None:
    """Download ``file`` to ``destination``, where a file appears only when it is complete and checked.

    What arrives before an interruption is kept beside it, and the next call resumes from there.

    Args:
        check: raises UserError for a file that can't be used as what it should be.
        replace: let the file take the place of another one.

    Raises:
        UserError: if it can't be downloaded, is not what the hub says it is, or another file is in its place.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(f".{destination.stem}.{file.digest[:12]}.part{destination.suffix}")
    lock = part.with_name(f"{part.name}.lock")
    with WeakFileLock(lock):
        try:
            if destination.is_file() and file.matches(destination):
                logger.info("%s is there already and matches the hub's", destination)
                return
            if destination.is_file() and not replace:
                raise UserError(
                    f"{destination} differs from {file.name} of {file.repo}; it is kept: to download, move it away."
                )
            # The library's own hf_hub_download starts from the beginning after a kill, and compares no hashes.
            with hub_errors(f"{file.name} of {file.repo} can't be downloaded"), open(part, "ab") as stream:
                url, size = hf_hub_url(file.repo, file.name, repo_type=file.repo_type), stream.tell()
                http_get(url, stream, resume_size=size, headers=build_hf_headers(), expected_size=file.size)
                os.fsync(stream.fileno())
            try:
                if not file.matches(part):
                    raise UserError("its hash differs from the hash that the hub states")
                check(part)
            except UserError as error:
                part.unlink()
                raise UserError(f"{file.name} of {file.repo} was downloaded and deleted: {error}") from None
            os.replace(part, destination)
            logger.info("%s: %.1f MB, checked against the hub's hash", destination, file.size / 1e6)
        finally:
            lock.unlink(missing_ok=True)  # a process that waits for the lock finds the file


def own_tokenizer(model: Path | None) -> Path | None:
    """Where a model's own tokenizer is looked for: the folder or repository that is given as the model, not a file."""
    if model is None or model.is_dir():
        return model
    name = hub_name(model)
    return model if name is not None and name[1] is None else None


def hub_name(path: Path) -> tuple[str, str | None] | None:
    """(repository, file or None) if ``path`` does not exist here and is a name on the hub; None otherwise.

    A name is `user/model`, `hf:user/model`, or `hf:user/model/FILE`. Without `hf:`, a path with a suffix of weights or
    into an existing folder is taken for a local file that is missing.
    """
    text = path.as_posix()
    match = _NAME.fullmatch(text)
    if match is None or path.exists():
        return None
    if not text.startswith("hf:") and (path.suffix in (*WEIGHTS, ".pt") or path.parent.is_dir()):
        return None
    return match[1] or match[2], match[3]


def find_file(path: Path, choose: Choice = choose_weights, download: bool = True) -> Path:
    """The local file that ``path`` stands for: itself, one in the folder it is, or one of the hub.

    A file of the hub is kept in the hub's cache and checked. Without network it is taken from the cache.

    Args:
        choose: which file of a folder or repository is meant, if ``path`` does not name it.
        download: False takes a file of the hub from the cache alone.

    Raises:
        UserError: if there is no such file, here or on the hub.
    """
    if path.is_dir():
        return path / choose([entry.name for entry in path.iterdir()], str(path))
    name = hub_name(path)
    if name is None:
        if not path.is_file():
            raise UserError(f"{path} does not exist.")
        return path
    if not download:
        cached = _find_in_cache(*name, choose)
        if cached is None:
            raise UserError(f"{path} is not on this machine, nor in the hub's cache, and a dry run downloads nothing.")
        return cached
    try:
        return _find_on_hub(*name, choose)
    except HubUnreachable as error:
        reason = str(error).rstrip(".")
        cached = _find_in_cache(*name, choose)
        if cached is None:
            raise UserError(f"{path} is not a file here, and on the hub: {reason}; nor is it cached.") from None
        logger.warning("%s; taken from the hub's cache: %s", reason, cached)
        return cached


def _find_on_hub(repo: str, wanted: str | None, choose: Choice) -> Path:
    files = {file.name: file for file in list_files(repo)}
    wanted = find_named(files, wanted or choose(list(files), repo), repo).name
    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "blobs")
    for name in (EXPORTED_CONFIG, wanted) if wanted == EXPORTED_MODEL and EXPORTED_CONFIG in files else (wanted,):
        # The cache keeps files under their digests. If one is there already, the library only gives it its name.
        fetch(files[name], blobs / files[name].digest, replace=True)
        with hub_errors(f"{name} of {repo}"):
            path = hf_hub_download(repo, name)
    return Path(path)


def _find_in_cache(repo: str, wanted: str | None, choose: Choice) -> Path | None:
    try:
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=wanted or EXPORTED_CONFIG))
        path = folder / (wanted or choose([entry.name for entry in folder.iterdir()], repo))
        blob = path.resolve(strict=True)
    except (OSError, ValueError):
        return None
    if blob.parent.name == "blobs" and not RemoteFile(repo, path.name, blob.stat().st_size, blob.name).matches(blob):
        raise UserError(f"{path} in the hub's cache is damaged: its hash differs; delete it.")
    return path
