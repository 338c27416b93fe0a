"""Compiling the core: finding the tools, running ninja, and doing it once for all processes of a machine."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyft.core import cache
from pyft.core.build_config import (
    CUDA_MODULE,
    BuildConfig,
    Nvcc,
    compile_flags,
    library_name,
    link_flags,
    nvcc_flags,
    pybind11_place,
    python_include,
    source_digest,
)
from pyft.core.cache import Failure, say
from pyft.core.nvcc import why_not
from pyft.errors import ConfigError

COMPILERS = ("c++", "g++", "clang++")
# How long to be silent about, and how long to wait for, another process that is compiling.
QUIET_SECONDS = 2.0
LOCK_SECONDS = 600.0

MEND_COMPILER = "apt-get install g++, or conda install gxx, or set CXX to a C++20 compiler"
MEND_NINJA = "pip install ninja"
MEND_PYBIND11 = "pip install pybind11"
MEND_HOST = "set CXX to a g++ that this nvcc supports, such as g++-12"
MEND_TOOLKIT = "install nvcc, its runtime and CCCL in one version: pyft doctor says which"
MEND_RUNTIME = "set CXX to a g++ that links it so, such as /usr/bin/g++"
MEND_MEMORY = "free some memory, or set MAX_JOBS=1"
MEND_DISK = "free some disk space, or set PYFT_CACHE_DIR to another disk"


class BuildError(Exception):
    """The core cannot be built or loaded; `failure` has the first error and the mend."""

    def __init__(self, error: str, mend: str, log: Path | None = None) -> None:
        super().__init__(f"{error} ({mend})")
        self.failure = Failure(error, mend, log)


@dataclass(frozen=True)
class Tools:
    """What a build needs, as found on this machine. None is what is missing."""

    compiler: str | None
    compiler_arguments: tuple[str, ...]
    ninja: str | None
    python_include: str | None
    pybind11_include: str | None
    nvcc: Nvcc | None = None

    def fingerprint(self) -> dict[str, str]:
        """What must change before a failed build is worth another try."""
        named = {
            "compiler": self.compiler,
            "ninja": self.ninja,
            "python": self.python_include and str(Path(self.python_include, "Python.h")),
            "pybind11": self.pybind11_include,
        }
        if self.nvcc is not None:
            places = {"CUDA runtime": self.nvcc.libraries, "CUDA headers": self.nvcc.include}
            named |= {"nvcc": self.nvcc.path, **{name: str(path) if path else None for name, path in places.items()}}
        return {name: _identity(path) for name, path in named.items()} | {"path": os.environ.get("PATH", "")}


def _identity(path: str | None) -> str:
    if path is None:
        return ""
    status = os.stat(path)
    return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"


def find_tools(nvcc: Nvcc | None = None) -> Tools:
    """Look for the compiler (`CXX`, else c++, g++, clang++), ninja, Python.h and pybind11. Runs none of them.

    Args:
        nvcc: the compiler of the CUDA core, as `pyft.core.nvcc` found it; None for the core of the CPU.
    """
    compiler, arguments = find_compiler()
    include = python_include()
    pybind11 = pybind11_place()[1]
    return Tools(compiler, arguments, find_ninja(), str(include) if include else None, pybind11, nvcc)


def find_compiler() -> tuple[str | None, tuple[str, ...]]:
    """Path of the compiler and the arguments that `CXX` gives it, as in `CXX="ccache g++"`."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        return shutil.which(wanted[0]), tuple(wanted[1:])
    return next((path for name in COMPILERS if (path := shutil.which(name))), None), ()


def find_ninja() -> str | None:
    """Path of ninja: from the pip package, wherever pip put its scripts, else on PATH."""
    places = []
    with contextlib.suppress(ImportError):
        import ninja

        places.append(Path(ninja.BIN_DIR, "ninja") if ninja.BIN_DIR else None)
        # `pip install --target` puts scripts beside the package.
        places.append(Path(str(ninja.__file__)).parents[1] / "bin" / "ninja")
    found = next((str(place) for place in places if place is not None and os.access(place, os.X_OK)), None)
    return found or shutil.which("ninja")


def python_package() -> str:
    """The system package that brings Python.h for this Python."""
    return f"python3-dev (or python3.{sys.version_info.minor}-dev)"


def check_tools(tools: Tools, config: BuildConfig | None = None) -> None:
    """Name everything that is missing, each with its mend.

    Args:
        tools: what `find_tools` found.
        config: what is to be built; None asks for what every build needs.

    Raises:
        BuildError: something is missing.
    """
    named = os.environ.get("CXX", "").strip()
    compiler = f"CXX names '{named}', which is not on PATH" if named else "no C++ compiler on PATH"
    checks = (
        (tools.compiler, compiler, MEND_COMPILER),
        (tools.ninja, "ninja is missing", MEND_NINJA),
        (tools.python_include, "Python.h is missing", f"apt-get install {python_package()}"),
        (tools.pybind11_include, "pybind11 is missing", MEND_PYBIND11),
    )
    missing = [(error, mend) for found, error, mend in checks if not found]
    if config is not None and config.module == CUDA_MODULE:
        problem = why_not(config.nvcc, config.torch.cuda)
        missing += [problem] if problem is not None else []
    if missing:
        raise BuildError("; ".join(error for error, _ in missing), "; ".join(mend for _, mend in missing))


def ninja_text(config: BuildConfig, tools: Tools) -> str:
    """The build.ninja that makes the library of `config` from its sources."""
    compiler = shlex.join([str(tools.compiler), *tools.compiler_arguments])
    library = library_name(config.module)
    # The whole name: an op's kernel and its host code have one stem.
    objects = {f"{path.name}.o": path for path in config.sources}
    rules = {".cpp": "compile", ".cu": "compile_cuda"}
    lines = [
        "ninja_required_version = 1.3",
        "rule compile",
        f"  command = {_ninja_value(compiler)} {_ninja_value(shlex.join(compile_flags(config)))} -c $in -o $out",
        *_cuda_rule(config, tools),
        "rule link",
        # Libraries come after the objects that need them.
        f"  command = {_ninja_value(compiler)} $in {_ninja_value(shlex.join(link_flags(config)))} -o $out",
        *(f"build {name}: {rules[path.suffix]} {_ninja_path(path)}" for name, path in objects.items()),
        f"build {library}: link {' '.join(objects)}",
        f"default {library}",
    ]
    return "\n".join(lines) + "\n"


def _cuda_rule(config: BuildConfig, tools: Tools) -> list[str]:
    if config.nvcc is None:
        return []
    # Of CXX="ccache g++" nvcc can be given the compiler only.
    words = [str(tools.compiler), *tools.compiler_arguments]
    host = next((path for word in reversed(words) if not word.startswith("-") and (path := shutil.which(word))), None)
    command = [config.nvcc.path, *(["-ccbin", host] if host else []), *nvcc_flags(config)]
    return ["rule compile_cuda", f"  command = {_ninja_value(shlex.join(command))} -c $in -o $out"]


def _ninja_value(text: str) -> str:
    return text.replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


def compile_into(folder: Path, config: BuildConfig, tools: Tools, log: Path) -> Path:
    """Compile a core in `folder`, an empty one, with everything the tools say in `log`. Returns the library.

    Raises:
        BuildError: a tool is missing, or said no.
    """
    check_tools(tools, config)
    (folder / "build.ninja").write_text(ninja_text(config, tools), encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS", "")
    command = [str(tools.ninja), "-C", str(folder), "-v", *(["-j", jobs] if jobs.isdecimal() and int(jobs) else [])]
    # The first error is found by the word "error:", which compilers translate.
    environment = os.environ | {"LC_ALL": "C"}
    with open(log, "w", encoding="utf-8") as file:
        file.write(f"torch {config.torch.version}\npython {sys.version}\ncompiler {compiler_version(tools)}\n")
        if config.nvcc is not None:
            file.write(f"nvcc {config.nvcc.release} at {config.nvcc.path}\narchs {' '.join(config.archs)}\n")
        file.write(f"{shlex.join(command)}\n")
        file.flush()
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    library = folder / library_name(config.module)
    if done.returncode != 0 or not library.is_file():
        text = log.read_text(encoding="utf-8", errors="replace")
        error = first_error(text) or f"ninja ended with status {done.returncode}"
        raise BuildError(error, mend_for(error, text, log), log)
    if sys.platform == "linux" and not shares_runtime(library):
        error = f"{tools.compiler} links no shared libstdc++, and an exception from the core would end the process"
        raise BuildError(error, MEND_RUNTIME, log)
    return library


def shares_runtime(library: Path) -> bool:
    """Whether a library throws by the C++ runtime that torch uses: exceptions pass between them, so it must be one."""
    content = library.read_bytes()
    return b"libstdc++.so" in content or b"__cxa_throw" not in content


def compiler_version(tools: Tools) -> str:
    """First line of the compiler's `--version`. Runs the compiler."""
    command = [str(tools.compiler), *tools.compiler_arguments, "--version"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{tools.compiler}: {error.strerror}"
    return (done.stdout or done.stderr).partition("\n")[0]


def first_error(text: str) -> str | None:
    """The first line of a build log that says what went wrong."""
    wanted = r"\berror: |undefined reference|cannot find -l|[Kk]illed|No space left|not found|Permission denied"
    # The commands themselves are in the log too, after ninja's [1/6] or below FAILED.
    skipped = re.compile(r"^(\[\d+/\d+\] |FAILED: |ninja: )")
    lines = text.splitlines()
    candidates = [
        line.strip()
        for before, line in zip(["", *lines], lines, strict=False)
        if not skipped.match(line) and not before.startswith("FAILED: ")
    ]
    found = next((line for line in candidates if re.search(r"\berror: ", line)), None)
    found = found or next((line for line in candidates if re.search(wanted, line)), None)
    return found or next((line for line in lines if line.startswith("ninja: error")), None)


def mend_for(error: str, text: str, log: Path) -> str:
    """What to do about a failed build, by its cause."""
    causes = (
        (r"Python\.h", f"apt-get install {python_package()}"),
        (r"pybind11/\S+: No such file", MEND_PYBIND11),
        (r"-std=c\+\+20|cannot execute|cc1plus: No such|not found", MEND_COMPILER),
        (r"Killed|out of memory|Cannot allocate", MEND_MEMORY),
        (r"No space left", MEND_DISK),
        (r"unsupported GNU version|unsupported clang version", MEND_HOST),
        (r"cudafe\+\+|cicc|nvlink|fatbinary|crt/|nv/target", MEND_TOOLKIT),
        (r"cannot find -l", "pip install --force-reinstall torch: its libraries are not beside it"),
    )
    found = next((mend for pattern, mend in causes if re.search(pattern, error)), None)
    if found is None and "Killed signal" in text:
        return MEND_MEMORY
    return found or f"read {log}, mend the compiler, then run pyft doctor"


def find_library(config: BuildConfig) -> Path | None:
    """The library of `config` in the cache; where there is no nvcc, the one that any nvcc made for the same archs."""
    library = library_name(config.module)
    found = cache.find_ready(config.key, library)
    if found is None and config.archs and config.nvcc is None:
        found = cache.find_built_for(config.base, library)
    return found


def build_cached(
    config: BuildConfig, *, rebuild: bool = False, retry: bool = False, wait: float = LOCK_SECONDS
) -> Path:
    """The library for `config`: from the cache, or compiled now, by one process at a time.

    Args:
        rebuild: compile even where the cache holds the library.
        retry: compile even where the cache remembers that it failed.
        wait: seconds to wait for another process that is compiling.

    Raises:
        BuildError: it cannot be built, now or (remembered) with the same tools before.
    """

    def cached() -> Path | None:
        if not rebuild and (ready := find_library(config)) is not None:
            return ready
        if tools and not (rebuild or retry) and (failure := cache.find_failed(config.key, tools.fingerprint())):
            raise BuildError(failure.error, failure.mend, failure.log)
        return None

    tools: Tools | None = None
    if (ready := cached()) is not None:
        return ready
    tools = find_tools(config.nvcc)
    check_tools(tools, config)
    cached()
    try:
        folder = cache.core_folder()
        with locked(folder / cache.LOCK, wait):
            # Another process may have built it, or failed to, while this one waited.
            return cached() or _build_entry(folder, config, tools)
    except ConfigError as error:
        raise BuildError(str(error), "set PYFT_CACHE_DIR to a folder that you can write") from error
    except OSError as error:
        mend = MEND_DISK if error.errno == errno.ENOSPC else "set PYFT_CACHE_DIR to a folder on a local disk"
        raise BuildError(str(error), mend) from error


@contextlib.contextmanager
def locked(path: Path, wait: float) -> Iterator[None]:
    """Hold the lock on `path`. The kernel frees it when the process that holds it ends, however it ends.

    Raises:
        BuildError: it did not come free in `wait` seconds.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=min(QUIET_SECONDS, wait))
    except Timeout:
        say(f"waiting for another process that is compiling the core (at most {wait:.0f} s), lock: {path}")
        try:
            lock.acquire(timeout=max(0.0, wait - QUIET_SECONDS))
        except Timeout:
            raise BuildError(
                f"another process has held {path} for {wait:.0f} s",
                f"see who holds it (fuser {path}), end it if it hangs, or set PYFT_CACHE_DIR to another folder",
            ) from None
    try:
        yield
    finally:
        lock.release()


def _build_entry(folder: Path, config: BuildConfig, tools: Tools) -> Path:
    """Compile into the entry of `config`, with the lock held. The marker is written last."""
    entry = folder / config.key
    library = library_name(config.module)
    cache.remove_leftovers(folder)
    if (damage := cache.damage(entry, library)) is not None:
        say(f"the core in {entry} is built again: {damage}")
    entry.mkdir(mode=0o700, exist_ok=True)
    (entry / cache.COMPLETE).unlink(missing_ok=True)
    log = entry / cache.LOG
    what = f"CUDA core for {', '.join(config.archs)}" if config.archs else "core"
    say(f"compiling the {what} (once, about half a minute), log: {log}")
    start = time.monotonic()
    temporary = Path(tempfile.mkdtemp(prefix=cache.BUILD_PREFIX, dir=entry))
    try:
        os.replace(compile_into(temporary, config, tools, log), entry / library)
    except BuildError as error:
        # What a full disk or memory stopped may well work the next time.
        if error.failure.mend not in (MEND_MEMORY, MEND_DISK):
            cache.mark_failed(entry, error.failure, tools.fingerprint())
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if source_digest(config.folder, config.module) != config.digest:
        raise BuildError(f"the sources in {config.folder} changed while they were compiled", "run it again", log)
    seconds = time.monotonic() - start
    facts: dict[str, Any] = {"torch": config.torch.version, "compiler": tools.compiler, "seconds": round(seconds, 1)}
    if config.nvcc is not None:
        facts |= {"nvcc": config.nvcc.release, "archs": list(config.archs), "base": config.base}
    cache.mark_complete(entry, facts, library)
    cache.prune(folder, keep=config.key)
    say(f"{'CUDA ' if config.archs else ''}core ready in {seconds:.1f} s")
    return entry / library
