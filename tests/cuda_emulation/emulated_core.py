"""The CUDA core compiled by the host's compiler: built with ninja, loaded in the place of the CPU's kernels.

Its ops register for CPU tensors, so every test of an op runs on its CUDA kernels. `python emulated_core.py` builds it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pyft.core import loader
from pyft.core.build_config import (
    COMPILE_FLAGS,
    CUDA_MODULE,
    LINK_FLAGS,
    core_sources,
    find_torch,
    pybind11_place,
    python_include,
    source_folder,
)
from pyft.core.cache import cache_root
from pyft.core.compile import find_compiler, find_ninja, locked

FOLDER = Path(__file__).resolve().parent
FLAGS = (
    "-DPYFT_CUDA_EMULATION",
    "-DPYFT_CUDA_SERVES_CPU",
    "-O2",
    "-g1",
    "-Wno-unknown-pragmas",
    "-MMD",
    "-MF",
    "$out.d",
)
# Optimised less: with all checks inside, the many kernels of the update took five minutes to compile.
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
ORDERS = ("ascending", "descending", "random")
COUNTERS = ("launches", "synchronisations", "copies", "copied_bytes", "fills", "allocations")


@dataclass(frozen=True)
class Flow:
    """What one kernel loads, or stores: accesses of threads, bytes, how many accesses are 128 bits wide, sectors of 32
    bytes, and accesses of whole warps."""

    accesses: int
    bytes: int
    wide: int
    sectors: int
    warp_accesses: int

    @property
    def sector_efficiency(self) -> float:
        """Bytes asked for over bytes of the sectors touched; above 1 where lanes share places."""
        return self.bytes / (32 * self.sectors) if self.sectors else 1.0


@dataclass(frozen=True)
class KernelTraffic:
    """Launches of a kernel and what they moved to and from global memory, all together."""

    launches: int
    loads: Flow
    stores: Flow


class Emulation:
    """Settings and counters of the emulation in a loaded library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.pyft_emulation_traffic.restype = ctypes.c_char_p
        self.order = "ascending"

    def set(
        self, order: str | None = None, *, races: bool = True, traffic: bool = False, processors: int = 3, each: int = 2
    ) -> None:
        """How the next launches run.

        Args:
            order: of threads and blocks: "ascending", "descending" or "random:SEED"; default: the one before.
            races: whether unordered accesses are errors.
            traffic: whether accesses are counted, which takes time.
            processors, each: multiprocessors, and blocks that each is said to hold: together the largest grid.
        """
        self.order = order or self.order
        name, _, seed = self.order.partition(":")
        if name not in ORDERS or bool(seed) != (name == "random") or (seed and not seed.isdecimal()):
            raise ValueError(f"the order is '{self.order}': expected ascending, descending or random:SEED")
        self._library.pyft_emulation_set(
            ORDERS.index(name), ctypes.c_uint64(int(seed or 0)), races, traffic, processors, each
        )

    def fail_next_launch(self, error: int) -> None:
        """The next launch gives this cudaError_t in place of running."""
        self._library.pyft_emulation_fail_next_launch(error)

    def counters(self) -> dict[str, int]:
        """Calls of the runtime since `reset`, by the names in `COUNTERS`."""
        counts = (ctypes.c_int64 * len(COUNTERS))()
        self._library.pyft_emulation_counters(counts)
        return dict(zip(COUNTERS, counts, strict=True))

    def traffic(self) -> dict[str, KernelTraffic]:
        """By kernel, since `reset`; only launches while `set(traffic=True)` moved anything."""
        found = {}
        for line in self._library.pyft_emulation_traffic().decode().splitlines():
            name, *words = line.split("\t")
            numbers = [int(word) for word in words]
            found[name] = KernelTraffic(numbers[0], Flow(*numbers[1:6]), Flow(*numbers[6:11]))
        return found

    def reset(self) -> None:
        """Counters and traffic begin at zero again."""
        self._library.pyft_emulation_reset()


def build(sanitize: bool = False) -> Path:
    """The library, compiled where its sources have changed since the last time.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer; a process that loads it must preload theirs.

    Raises:
        RuntimeError: the compiler said no.
    """
    folder = cache_root() / "cuda_emulation" / _key(sanitize)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "build.lock", 600.0):
        (folder / "build.ninja").write_text(_ninja_text(sanitize))
        command = [str(find_ninja()), "-C", str(folder), "--quiet", *_jobs()]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the emulated CUDA core does not compile:\n{done.stdout}")
    return folder / f"{CUDA_MODULE}.so"


def _jobs() -> list[str]:
    jobs = os.environ.get("MAX_JOBS", "")
    return ["-j", jobs] if jobs.isdecimal() and int(jobs) else []


def _key(sanitize: bool) -> str:
    torch = find_torch()
    parts = (source_folder(), torch.version, torch.git_version, sys.implementation.cache_tag, _flags(sanitize))
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _flags(sanitize: bool) -> list[str]:
    # Headers of the emulation stand for those of the toolkit, so they come first.
    places = [find_torch().root / "include", pybind11_place()[1], python_include()]
    systems = [flag for place in places for flag in ("-isystem", str(place))]
    module = f"-DTORCH_EXTENSION_NAME={CUDA_MODULE}"
    includes = [f"-I{FOLDER}", f"-I{source_folder()}", *systems]
    return [*COMPILE_FLAGS, module, *FLAGS, *(SANITIZE if sanitize else ()), *includes]


def _ninja_text(sanitize: bool) -> str:
    compiler, arguments = find_compiler()
    command = shlex.join([str(compiler), *arguments])
    sources = [*core_sources(source_folder(), CUDA_MODULE), FOLDER / "emulated_controls.cpp"]
    objects = {f"{path.name}.o": path for path in sources}
    flags = " ".join(flag if flag == "$out.d" else shlex.quote(flag) for flag in _flags(sanitize))
    link = shlex.join([LINK_FLAGS[0], f"-L{find_torch().root / 'lib'}", *LINK_FLAGS[1:]])
    return "\n".join(
        [
            "rule compile",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  command = {command} {flags} -x c++ -c $in -o $out",
            "rule link",
            f"  command = {command} {' '.join(SANITIZE) if sanitize else ''} $in {link} -o $out",
            *(f"build {name}: compile {path}" for name, path in objects.items()),
            f"build {CUDA_MODULE}.so: link {' '.join(objects)}",
            "",
        ]
    )


def load(order: str, sanitize: bool = False) -> tuple[ModuleType, Emulation]:
    """Build the library and let its kernels serve CPU tensors for the rest of this process.

    Args:
        order: see `Emulation.set`.
    """
    library = build(sanitize)
    # The CPU's kernels first: those that come later replace them.
    if loader.load_core() is None:
        raise RuntimeError("the emulated CUDA core needs the compiled one beside it: see pyft doctor")
    module = loader.import_library(library, CUDA_MODULE)
    outcomes: dict[str, Any] = loader._outcomes
    outcomes[CUDA_MODULE] = loader._Outcome(module, None)
    emulation = Emulation(library)
    emulation.set(order)
    return module, emulation


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv[1:]))
