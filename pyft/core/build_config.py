"""The one list of sources and flags of the compiled core, for the build at first use and for setup.py.

setup.py loads this file by its path where neither torch nor pyft is installed: standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

COMPILE_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # sqrt vectorises only where it need not set errno.
    "-fno-math-errno",
    # Selects between floats vectorise only where no trap can be set by what is not chosen.
    "-fno-trapping-math",
    # Without fused multiply-add by chance, every CPU target gives the same bits.
    "-ffp-contract=off",
    "-Wall",
    # The stable ABI of torch 2.13: major and minor in the two highest bytes (torch/csrc/stable/version.h).
    "-DTORCH_TARGET_VERSION=0x020d000000000000",
    "-DTORCH_EXTENSION_NAME=_core",
)
LINK_FLAGS = ("-shared", "-ltorch", "-ltorch_cpu", "-lc10")
SOURCE_SUFFIXES = (".cpp",)
HEADER_SUFFIXES = (".h",)
# Raise when the layout of a cache entry or of the record beside an ahead-of-time build changes.
FORMAT = "1"

MODULE = "_core"
AHEAD_OF_TIME_RECORD = "_core.json"
PACKAGED_SOURCES = "_csrc"


@dataclass(frozen=True)
class TorchInstall:
    """The torch that Python would import: where it is and which build it is, read without importing it."""

    root: Path
    version: str
    git_version: str
    cuda: str | None


@dataclass(frozen=True)
class BuildConfig:
    """All that decides the bytes of the compiled core, except the compiler itself.

    `digest` stands for sources and flags alone, `key` also for torch, Python, pybind11 and the platform.
    """

    folder: Path
    sources: tuple[Path, ...]
    torch: TorchInstall
    digest: str
    key: str


def source_folder() -> Path:
    """The folder of the C++ sources: `PYFT_CSRC`, else inside an installed package, else beside it in a checkout.

    Raises:
        FileNotFoundError: none of them holds a source file.
    """
    package = Path(__file__).resolve().parents[1]
    chosen = os.environ.get("PYFT_CSRC")
    # A folder named csrc beside an installed pyft could be anybody's, so the package's own comes first.
    places = [Path(chosen).absolute()] if chosen else [package / PACKAGED_SOURCES, package.parent / "csrc"]
    for place in places:
        if any(path.suffix in SOURCE_SUFFIXES for path in source_files(place)):
            return place
    raise FileNotFoundError(f"no C++ sources in {' or '.join(map(str, places))}")


def source_files(folder: Path) -> list[Path]:
    """Sources and headers in the flat `folder`, sorted by name. Empty when there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in SOURCE_SUFFIXES + HEADER_SUFFIXES)


def source_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all sources and headers in `folder`, and over the flags."""
    digest = hashlib.sha256()
    for text in (FORMAT, *COMPILE_FLAGS, *LINK_FLAGS):
        digest.update(f"{text}\n".encode())
    for path in source_files(folder):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def find_torch() -> TorchInstall:
    """The installed torch, without importing it.

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("torch is not installed: pip install torch", name="torch")
    root = Path(next(iter(spec.submodule_search_locations)))
    text = (root / "version.py").read_text(encoding="utf-8")
    values = dict(re.findall(r"""^(\w+)\s*(?::[^=\n]*)?=\s*['"]([^'"]*)['"]""", text, flags=re.MULTILINE))
    return TorchInstall(root, values.get("__version__", ""), values.get("git_version", ""), values.get("cuda"))


def pybind11_place() -> tuple[str, str | None]:
    """Version and include folder of the installed pybind11, or ("", None)."""
    try:
        import pybind11
    except ImportError:
        return "", None
    return pybind11.__version__, pybind11.get_include()


def python_include() -> Path | None:
    """The folder that holds Python.h: this Python's own, or one named by `CPATH` or `CPLUS_INCLUDE_PATH`."""
    places = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    for variable in ("CPATH", "CPLUS_INCLUDE_PATH"):
        places += os.environ.get(variable, "").split(os.pathsep)
    return next((Path(place) for place in places if place and Path(place, "Python.h").is_file()), None)


def make_config(folder: Path | None = None) -> BuildConfig:
    """What to build here and now, from the sources in `folder` (default: `source_folder()`).

    Raises:
        FileNotFoundError: there are no sources.
        ModuleNotFoundError: torch is not installed.
    """
    folder = source_folder() if folder is None else folder
    torch = find_torch()
    digest = source_digest(folder)
    parts = (
        digest,
        torch.version,
        torch.git_version,
        sys.implementation.cache_tag,
        str(sysconfig.get_config_var("SOABI")),
        pybind11_place()[0],
        sys.platform,
        platform.machine(),
        # A home folder may be shared by machines with different system libraries.
        os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else "",
        os.environ.get("CXX", ""),
    )
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    sources = tuple(path for path in source_files(folder) if path.suffix in SOURCE_SUFFIXES)
    return BuildConfig(folder, sources, torch, digest, key[:16])


def compile_flags(config: BuildConfig) -> list[str]:
    """Flags for one source file, include folders of torch, pybind11 and Python among them."""
    places = [config.torch.root / "include", pybind11_place()[1], python_include()]
    # As -isystem these two would come before the compiler's own headers and break #include_next.
    known = ("/usr/include", "/usr/local/include")
    includes = [flag for place in places if place and str(place) not in known for flag in ("-isystem", str(place))]
    return [*COMPILE_FLAGS, f"-I{config.folder}", *includes]


def link_flags(config: BuildConfig) -> list[str]:
    """Flags that link the objects. No rpath: torch is imported before the core, so its libraries are there."""
    return [LINK_FLAGS[0], f"-L{config.torch.root / 'lib'}", *LINK_FLAGS[1:]]
