"""Loading the cores: an ahead-of-time build that fits, else the cache, else compile it now. Once per process.

There are two: that of the CPU, and that of CUDA, which is loaded at the first CUDA tensor that an op sees.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from pyft.core import cache
from pyft.core.build_config import CUDA_MODULE, MODULE, BuildConfig, make_config, make_cuda_config, record_name
from pyft.core.cache import Failure, say
from pyft.core.cuda_archs import present_capabilities, uncovered
from pyft.errors import ConfigError, CoreError

MODES = ("auto", "require", "off")
State = Literal["ready", "not built", "failed", "off"]


@dataclass(frozen=True)
class CoreStatus:
    """Where the core stands, found without building or loading it.

    `path` is the library that is or would be loaded, `key` its name in the cache, `reason` one line on how it came
    to this state, `failure` the remembered one where `state` is "failed".
    """

    state: State
    path: Path | None
    key: str | None
    reason: str
    failure: Failure | None = None


@dataclass(frozen=True)
class _Outcome:
    module: ModuleType | None
    failure: Failure | None


# By module: what became of loading it.
_outcomes: dict[str, _Outcome] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    """A child forked while another thread was loading would wait for that thread for ever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def load_core() -> ModuleType | None:
    """The compiled core, or None where the PyTorch reference is to be used. Compiles it on the first call, if need be.

    `PYFT_CORE` decides what a failure means: "auto" (default) one RuntimeWarning with the first compiler error and the
    mend, then None for the rest of the process; "require" CoreError; "off" None without a word.

    Raises:
        CoreError: the core cannot be built or loaded, and `PYFT_CORE=require`.
        ConfigError: `PYFT_CORE` has another value.
    """
    return _module_of(MODULE)


def load_cuda_core() -> ModuleType | None:
    """The same for the core of CUDA, whose kernels serve `torch.ops.pyft` on CUDA tensors once this returned it.

    It is compiled for the GPUs of this process, or for what `PYFT_CUDA_ARCHS` names. Call it only where there is a CUDA
    tensor: looking for GPUs starts CUDA.

    Raises:
        CoreError: it cannot be built or loaded, and `PYFT_CORE=require`.
        ConfigError: `PYFT_CORE` has another value.
    """
    return _module_of(CUDA_MODULE)


def load_core_for(device_type: str) -> ModuleType | None:
    """The core whose kernels serve tensors of a device, loaded now if need be; None where the reference serves them.

    Args:
        device_type: `tensor.device.type`.
    """
    if device_type == "cpu":
        return load_core()
    return load_cuda_core() if device_type == "cuda" else None


def _module_of(name: str) -> ModuleType | None:
    outcome = _outcomes.get(name)
    if outcome is None:
        outcome = _load_once(name)
    if outcome.module is None and outcome.failure is not None and core_mode() == "require":
        raise CoreError(failure_text(outcome.failure, name))
    return outcome.module


def core_mode() -> str:
    """The value of `PYFT_CORE`: "auto", "require" or "off".

    Raises:
        ConfigError: it is something else.
    """
    mode = os.environ.get("PYFT_CORE") or "auto"
    if mode not in MODES:
        raise ConfigError(f"PYFT_CORE is '{mode}': expected auto, require or off")
    return mode


def failure_text(failure: Failure, module: str = MODULE) -> str:
    """What went wrong, what mends it, and where the full log is, in one paragraph."""
    log = f" Log: {failure.log}." if failure.log else ""
    core = "CUDA core" if module == CUDA_MODULE else "compiled core"
    return f"the {core} cannot be used: {failure.error}. Mend: {failure.mend}.{log}"


def _load_once(name: str) -> _Outcome:
    from pyft.core.compile import BuildError

    with _lock:
        if name in _outcomes:
            return _outcomes[name]
        mode = core_mode()
        if mode == "off":
            return _outcomes.setdefault(name, _Outcome(None, None))
        try:
            _outcomes[name] = _Outcome(_load(name), None)
        except BuildError as error:
            # Kept before the warning, which a filter may turn into an exception.
            _outcomes[name] = _Outcome(None, error.failure)
            if mode == "auto":
                where = " on the GPU" if name == CUDA_MODULE else ""
                text = f"{failure_text(error.failure, name)} Until then the slower PyTorch reference computes the same"
                warnings.warn(f"pyft: {text}{where} (PYFT_CORE=off silences this).", RuntimeWarning, stacklevel=4)
        return _outcomes[name]


def _load(module: str) -> ModuleType:
    from pyft.core.compile import BuildError, build_cached

    config = ahead_config(module)
    library, reason = ahead_of_time(config)
    if library is not None:
        try:
            return import_library(library, module)
        except BuildError as error:
            reason = error.failure.error
    if reason is not None:
        say(f"the {'CUDA ' if module == CUDA_MODULE else ''}core built ahead of time is not used: {reason}")
    return import_library(build_cached(buildable(config)), module)


def ahead_config(module: str = MODULE) -> BuildConfig:
    """What an ahead-of-time build must fit. For CUDA it names no nvcc and no archs yet: `buildable` adds them."""
    from pyft.core.compile import BuildError

    try:
        return make_config() if module == MODULE else make_cuda_config(None, ())
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise BuildError(str(error), "pip install --force-reinstall pyft (and torch, where it is missing)") from error


def buildable(config: BuildConfig) -> BuildConfig:
    """`config` with all that a build needs.

    Raises:
        BuildError: for CUDA: there is nothing to compile for, or `PYFT_CUDA_ARCHS` does not serve the GPU.
    """
    if config.module == MODULE:
        return config
    from pyft.core.cuda_build import cuda_config

    return cuda_config(config.folder)


def ahead_of_time(config: BuildConfig, package: Path | None = None) -> tuple[Path | None, str | None]:
    """The library that was built with the package, if it fits; else None and, where there is one, why it does not.

    Args:
        config: what would be built now.
        package: the folder of the pyft package; default: this one.
    """
    package = Path(__file__).resolve().parents[1] if package is None else package
    record = cache.read_marker(package / record_name(config.module))
    if record is None:
        return None, None
    names = (package / f"{config.module}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    library = next((path for path in names if path.is_file()), None)
    if library is None:
        return None, f"it is for Python {record.get('python')}"
    if record.get("torch") != config.torch.version:
        return None, f"it was built with torch {record.get('torch')}, this is torch {config.torch.version}"
    if record.get("digest") != config.digest:
        return None, f"the sources in {config.folder} are not those that it was built from"
    if config.module == CUDA_MODULE:
        archs = [str(arch) for arch in record.get("archs", [])]
        lacking = uncovered(archs, present_capabilities())
        if lacking is not None:
            return None, f"it was built for {', '.join(archs)}, a GPU here has {lacking[0]}.{lacking[1]}"
    return library, None


def import_library(path: Path, module: str = MODULE) -> ModuleType:
    """Load the compiled `module` at `path`, after torch, whose libraries it needs.

    Raises:
        BuildError: the system's loader or the module itself said no.
    """
    from pyft.core.compile import BuildError

    importlib.import_module("torch")
    name = f"pyft.{module}"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        loaded = importlib.util.module_from_spec(spec)
        loader.exec_module(loaded)
    except (ImportError, OSError, RuntimeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}", _load_mend(str(error))) from error
    sys.modules[name] = loaded
    return loaded


def _load_mend(error: str) -> str:
    if re.search(r"failed to map segment|[Oo]peration not permitted", error):
        return "set PYFT_CACHE_DIR to a folder on a file system that is not mounted noexec"
    return "run pyft doctor, which builds it again"


def core_status(module: str = MODULE) -> CoreStatus:
    """Where a core stands. Builds and loads nothing; for CUDA nvcc is asked for its version.

    Args:
        module: "_core", or "_core_cuda".

    Raises:
        ConfigError: `PYFT_CORE` is not auto, require or off.
    """
    from pyft.core.compile import BuildError, find_library, find_tools

    off = core_mode() == "off"
    try:
        config = ahead_config(module)
        library, why_not = ahead_of_time(config)
        if not off and library is None:
            config = buildable(config)
    except BuildError as error:
        return CoreStatus("off" if off else "failed", None, None, error.failure.error, error.failure)
    if off:
        return CoreStatus("off", None, config.key, "PYFT_CORE=off")
    if library is not None:
        return CoreStatus("ready", library, config.key, "built ahead of time")
    if (library := find_library(config)) is not None:
        return CoreStatus("ready", library, config.key, "in the cache")
    failure = cache.find_failed(config.key, find_tools(config.nvcc).fingerprint())
    if failure is not None:
        return CoreStatus("failed", None, config.key, failure.error, failure)
    return CoreStatus("not built", None, config.key, why_not or "it is compiled at first use")
