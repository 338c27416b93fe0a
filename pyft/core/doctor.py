"""What this machine has for pyft, whether the core works, and what to do next."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TextIO

from pyft.core import cache, loader
from pyft.core.build_config import CUDA_MODULE, MODULE, find_torch, make_config, python_include
from pyft.core.cache import Failure
from pyft.core.compile import BuildError, Tools, build_cached, compiler_version, find_tools
from pyft.core.cuda_archs import present_capabilities
from pyft.core.cuda_build import cuda_config
from pyft.core.nvcc import find_nvcc, known_archs, why_not
from pyft.errors import ConfigError
from pyft.version import __version__

WIDTH = 96
LABEL = 12

# What each PYFT_ variable does, for those that are set.
VARIABLES = {
    "PYFT_BUILD_CORE": "1 while pip installs: build the core then",
    "PYFT_BUILD_CUDA": "1 or 0 with PYFT_BUILD_CORE=1: build the CUDA core too, or not",
    "PYFT_CACHE_DIR": "the cache folder",
    "PYFT_CORE": "auto, require or off",
    "PYFT_CPU_TARGET": "baseline, avx2 or avx512",
    "PYFT_CUDA_ARCHS": "compute capabilities that the CUDA core is compiled for",
    "PYFT_CSRC": "build the core from the sources in this folder",
    "PYFT_TEST_DATA": "data sets for the tests",
}
# Build variables of others that change what pyft does.
OTHER_VARIABLES = (
    *("CXX", "CPATH", "CPLUS_INCLUDE_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES"),
    *("MAX_JOBS", "OMP_NUM_THREADS", "XDG_CACHE_HOME"),
)


@dataclass(frozen=True)
class Extra:
    """An optional part: its packages as (module, distribution), what it gives, and what it downloads in MB.

    `megabytes` is without numpy and what torch itself brings.
    """

    packages: tuple[tuple[str, str], ...]
    gives: str
    megabytes: int


EXTRAS = {
    "text": Extra((("transformers", "transformers"), ("tokenizers", "tokenizers")), "text models and tokenizers", 28),
    "image": Extra((("PIL", "Pillow"),), "reading image files", 7),
    "onnx": Extra(
        (("onnx", "onnx"), ("onnxscript", "onnxscript"), ("onnxruntime", "onnxruntime")),
        "ONNX export, and running the exported file",
        35,
    ),
    "report": Extra((("matplotlib", "matplotlib"),), "pictures of a run", 25),
}


@dataclass(frozen=True)
class _Core:
    """The core as the doctor found it. `failure` is None when it works or would work."""

    state: str
    module: ModuleType | None
    failure: Failure | None


def doctor(build: bool = True, file: TextIO | None = None) -> int:
    """Print what pyft finds on this machine and what to do next.

    Args:
        build: compile the core if it is not there yet, also after a remembered failure. False only looks.
        file: where to print; default: standard output.

    Returns:
        Exit code: 0, or 1 when the core cannot be built, or that of CUDA where there is a GPU for it.
    """
    file = sys.stdout if file is None else file
    tools = find_tools()
    try:
        core = _examine_core(build)
    except ConfigError as error:
        core = _Core(str(error), None, Failure(str(error), "unset PYFT_CORE, or set it to one of these"))
    cuda = _examine_cuda_core(build)
    rows = [
        ("pyft", f"{__version__} at {Path(__file__).resolve().parents[1]}"),
        ("python", f"{platform.python_version()} at {sys.executable}"),
        *_torch_rows(),
        ("CPU", _cpu_row(core.module)),
        ("GPU", _gpu_row()),
        ("core", core.state),
        ("CUDA core", cuda.state),
        *_tool_rows(tools),
        ("nvcc", _nvcc_row()),
        *_cache_rows(),
        *_variable_rows(),
        *_extra_rows(),
        ("next", _next(core, cuda)),
    ]
    for label, text in rows:
        print(_row(label, text), file=file)
    return 0 if core.failure is None and cuda.failure is None else 1


def _row(label: str, text: str) -> str:
    """`label` in its column, `text` folded beside it. Paths are not broken."""
    lines = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join(f"{label if number == 0 else '':<{LABEL}}{line}" for number, line in enumerate(lines))


def _examine_core(build: bool, name: str = MODULE) -> _Core:
    """Build (if asked) and load a core; a cached one that cannot be loaded is built again."""
    make = make_config if name == MODULE else cuda_config
    status = loader.core_status(name)
    if status.state == "failed" and status.key is None:
        return _Core(f"cannot be built: {status.reason}", None, status.failure)
    try:
        if status.state == "off":
            if build and loader.ahead_of_time(loader.ahead_config(name))[0] is None:
                build_cached(make(), retry=True)
            return _Core(f"off (PYFT_CORE=off){'; it can be built here' if build else ''}", None, None)
        if status.state != "ready" and not build:
            return _Core(f"{status.state}: {status.reason}", None, status.failure)
        library = status.path or build_cached(make(), retry=True)
        how = "built now" if status.path is None else status.reason
        module, how = _load_or_rebuild(library, how, build, name)
    except BuildError as error:
        return _Core(f"cannot be used: {error.failure.error}", None, error.failure)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        return _Core(f"cannot be built: {error}", None, Failure(str(error), "pip install --force-reinstall pyft"))
    return _Core(f"ready, {how}: {module.__file__}", module, None)


def _examine_cuda_core(build: bool) -> _Core:
    """The same for the core of CUDA, where torch has CUDA and there is a GPU."""
    try:
        if find_torch().cuda is None:
            return _Core("not used: this torch is built without CUDA", None, None)
        capabilities = present_capabilities()
        if not capabilities:
            return _Core("not used: there is no GPU", None, None)
        core = _examine_core(build, CUDA_MODULE)
        for_what = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        return _Core(f"{core.state}; GPUs of compute capability {for_what}", core.module, core.failure)
    except ImportError as error:
        return _Core(f"not used: {error}", None, None)
    except ConfigError as error:
        return _Core(str(error), None, Failure(str(error), "set what it names"))


def _load_or_rebuild(library: Path, how: str, build: bool, name: str) -> tuple[ModuleType, str]:
    loaded = sys.modules.get(f"pyft.{name}")
    if loaded is not None:
        return loaded, how
    try:
        return loader.import_library(library, name), how
    except BuildError as error:
        if not build:
            raise
        cache.say(f"building again: {error.failure.error}")
    make = make_config if name == MODULE else cuda_config
    return loader.import_library(build_cached(make(), rebuild=True), name), "built again now"


def _torch_rows() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("torch", f"cannot be imported: {error}")]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return [("torch", f"{torch.__version__}, {cuda}, threads: {torch.get_num_threads()}")]


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _cpu_row(module: ModuleType | None) -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = f"{_cpu_name()}, {usable} usable"
    if module is None:
        return f"{name}; target in use: none, the core is not loaded"
    try:
        target = str(module.cpu_target())
    except (RuntimeError, ValueError) as error:
        return f"{name}; target in use: {error}"
    forced = " (forced by PYFT_CPU_TARGET)" if os.environ.get("PYFT_CPU_TARGET") else ""
    possible = module.build_info().get("cpu_targets", [])
    return f"{name}; target in use: {target}{forced}; possible: {', '.join(possible)}"


def _gpu_row() -> str:
    try:
        import torch
    except ImportError:
        return "unknown without torch"
    if torch.version.cuda is None:
        return "not used: this torch is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reason = f": {str(caught[0].message).splitlines()[0]}" if caught else ""
        return f"none that this torch can use{reason}"
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return "; ".join(
        f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
        for device in devices
    )


def _tool_rows(tools: Tools) -> list[tuple[str, str]]:
    named = os.environ.get("CXX")
    compiler = f"{compiler_version(tools)} at {tools.compiler}" if tools.compiler else "missing"
    header = python_include()
    return [
        ("compiler", f"{compiler}{f' (CXX={named})' if named else ''}"),
        ("ninja", f"{_version(tools.ninja)} at {tools.ninja}" if tools.ninja else "missing"),
        ("Python.h", f"in {header}" if header else "missing"),
        ("pybind11", tools.pybind11_include or "missing"),
    ]


def _version(program: str) -> str:
    """First line of `program --version`, or why it cannot be run."""
    try:
        done = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        return f"cannot be run ({error.strerror})"
    return done.stdout.partition("\n")[0] if done.returncode == 0 else f"ends with status {done.returncode}"


def _nvcc_row() -> str:
    try:
        cuda = find_torch().cuda
    except ModuleNotFoundError:
        cuda = None
    nvcc = find_nvcc(cuda)
    if nvcc is None:
        text, mend = why_not(None, cuda) or ("", "")
        return (
            f"{text.removeprefix('nvcc is ')}. Mend: {mend}" if cuda is not None else "none (not needed without a GPU)"
        )
    archs = [int(arch) for arch in known_archs(nvcc)]
    range_text = f", for {min(archs)} to {max(archs)}" if archs else ""
    found = f"{nvcc.release} at {nvcc.path}{range_text}"
    if cuda is None:
        return f"{found}; not used: this torch is built without CUDA"
    problem = why_not(nvcc, cuda)
    return f"{found}; fits torch's CUDA {cuda}" if problem is None else f"{found}; {problem[0]}. Mend: {problem[1]}"


def _cache_rows() -> list[tuple[str, str]]:
    try:
        root = cache.cache_root()
    except ConfigError as error:
        return [("cache", str(error))]
    cores = cache.entries(root / cache.CORE)
    ready = sum((entry / cache.COMPLETE).is_file() for entry in cores)
    failed = sum((entry / cache.FAILED).is_file() for entry in cores)
    size = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file()) / 1e6
    return [("cache", f"{root}, {size:.1f} MB: {ready} built cores, {failed} remembered failures")]


def _variable_rows() -> list[tuple[str, str]]:
    rows = []
    for name, value in sorted(os.environ.items()):
        if name in OTHER_VARIABLES:
            rows.append(f"{name}={value}")
        elif name.startswith("PYFT_"):
            rows.append(f"{name}={value} ({VARIABLES.get(name, 'not a variable that pyft knows: misspelt?')})")
    return [("variables" if number == 0 else "", row) for number, row in enumerate(rows or ["none set"])]


def _extra_rows() -> list[tuple[str, str]]:
    rows = []
    for name, extra in EXTRAS.items():
        found = [f"{title} {_package_version(title)}" for module, title in extra.packages if _present(module)]
        missing = [title for module, title in extra.packages if not _present(module)]
        if missing:
            lack = f"missing {', '.join(missing)}; would give {extra.gives}"
            rows.append(f"{name}: {lack}, about {extra.megabytes} MB: pip install 'pyft[{name}]'")
        else:
            rows.append(f"{name}: {', '.join(found)}; gives {extra.gives}")
    return [("extras" if number == 0 else "", row) for number, row in enumerate(rows)]


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _package_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


def _next(core: _Core, cuda: _Core) -> str:
    """The next thing to type."""
    if core.failure is None and cuda.failure is not None:
        return f"{cuda.failure.mend}. Until then pyft computes the same with PyTorch on the GPU, slower"
    if core.failure is not None:
        return f"{core.failure.mend}. Until then pyft computes the same with PyTorch, slower"
    missing = [name for name in ("text", "onnx") if not all(_present(module) for module, _ in EXTRAS[name].packages)]
    if missing:
        return "pip install 'pyft[quickstart]', then: pyft quickstart"
    return "pyft quickstart"
