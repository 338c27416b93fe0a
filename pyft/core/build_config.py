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
)
LINK_FLAGS = ("-shared", "-ltorch", "-ltorch_cpu", "-lc10")
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    # As -ffp-contract=off above: the same bits as on the CPU. The kernels wait for memory, not for arithmetic.
    "--fmad=false",
    # std::max and its kind, which C++20 makes constexpr, may then be called from a kernel.
    "--expt-relaxed-constexpr",
    # Registers and spills of each kernel are written to the log.
    "--resource-usage",
)
NVCC_HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-Wall")
# The static runtime asks only for a driver, so the library loads beside torch's own, and on a machine without a GPU.
CUDA_LINK_FLAGS = ("-lcudart_static", "-lrt", "-ldl", "-lpthread")
SOURCE_SUFFIXES = (".cpp", ".cu")
HEADER_SUFFIXES = (".h",)
# Raise when the layout of a cache entry or of the record beside an ahead-of-time build changes.
FORMAT = "2"

MODULE = "_core"
CUDA_MODULE = "_core_cuda"
PACKAGED_SOURCES = "_csrc"


@dataclass(frozen=True)
class TorchInstall:
    """The torch that Python would import: where it is and which build it is, read without importing it."""

    root: Path
    version: str
    git_version: str
    cuda: str | None


@dataclass(frozen=True)
class Nvcc:
    """An nvcc and what it was installed with: its release ("13.0.88"), headers, and the folder of libcudart_static.a.

    The folders are None where the toolkit lacks them.
    """

    path: str
    release: str
    include: Path | None
    libraries: Path | None


@dataclass(frozen=True)
class BuildConfig:
    """All that decides the bytes of a compiled core, except the host compiler itself.

    `digest` stands for sources and flags alone, `key` also for torch, Python, pybind11, the platform, nvcc and archs;
    `base` is the key without nvcc, so that a machine without it finds what another one built.
    """

    folder: Path
    sources: tuple[Path, ...]
    torch: TorchInstall
    digest: str
    key: str
    module: str = MODULE
    nvcc: Nvcc | None = None
    archs: tuple[str, ...] = ()
    base: str = ""


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


def belongs_to_cuda(path: Path) -> bool:
    """Whether only the CUDA core is made from a file: `*.cu`, `*_cuda.cpp`, `*_cuda.h`, `cuda_*.h`."""
    return path.suffix == ".cu" or path.stem.endswith("_cuda") or path.stem.startswith("cuda_")


def core_sources(folder: Path, module: str) -> list[Path]:
    """The files that are compiled for `module`: "_core" or "_core_cuda"."""
    cuda = module == CUDA_MODULE
    return [path for path in source_files(folder) if path.suffix in SOURCE_SUFFIXES and belongs_to_cuda(path) == cuda]


def source_digest(folder: Path, module: str = MODULE) -> str:
    """SHA-256 over names and bytes of the sources of `module` and of all headers it may read, and over the flags."""
    cuda = module == CUDA_MODULE
    digest = hashlib.sha256()
    flags = (*COMPILE_FLAGS, *LINK_FLAGS, *((*NVCC_FLAGS, *NVCC_HOST_FLAGS, *CUDA_LINK_FLAGS) if cuda else ()))
    for text in (FORMAT, module, *flags):
        digest.update(f"{text}\n".encode())
    headers = [p for p in source_files(folder) if p.suffix in HEADER_SUFFIXES and (cuda or not belongs_to_cuda(p))]
    for path in sorted([*core_sources(folder, module), *headers]):
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
    """What to build here and now for the CPU, from the sources in `folder` (default: `source_folder()`).

    Raises:
        FileNotFoundError: there are no sources.
        ModuleNotFoundError: torch is not installed.
    """
    folder = source_folder() if folder is None else folder
    torch = find_torch()
    digest = source_digest(folder)
    base = _key(digest, torch)
    return BuildConfig(folder, tuple(core_sources(folder, MODULE)), torch, digest, base, base=base)


def make_cuda_config(nvcc: Nvcc | None, archs: tuple[str, ...], folder: Path | None = None) -> BuildConfig:
    """What to build here and now for CUDA.

    Args:
        nvcc: the compiler; None where there is none: its cores of before can still be found, none be built.
        archs: what to compile for, as `pyft.core.cuda_archs` writes them: "80", "90a", "90+PTX".
        folder: the sources; default: `source_folder()`.

    Raises:
        FileNotFoundError: there are no sources.
        ModuleNotFoundError: torch is not installed.
    """
    folder = source_folder() if folder is None else folder
    torch = find_torch()
    digest = source_digest(folder, CUDA_MODULE)
    base = _key(digest, torch, *archs)
    key = _key(digest, torch, *archs, nvcc.release) if nvcc is not None else base
    sources = tuple(core_sources(folder, CUDA_MODULE))
    return BuildConfig(folder, sources, torch, digest, key, CUDA_MODULE, nvcc, archs, base)


def _key(digest: str, torch: TorchInstall, *more: str) -> str:
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
        *more,
    )
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def library_name(module: str) -> str:
    """File of a built core in the cache."""
    return f"{module}.so"


def record_name(module: str) -> str:
    """File beside a core that was built ahead of time, which says what it fits."""
    return f"{module}.json"


def compile_flags(config: BuildConfig) -> list[str]:
    """Flags for one .cpp file, include folders of torch, pybind11, Python and CUDA among them."""
    cuda = config.nvcc.include if config.nvcc is not None else None
    places = [config.torch.root / "include", pybind11_place()[1], python_include(), cuda]
    # As -isystem these two would come before the compiler's own headers and break #include_next.
    known = ("/usr/include", "/usr/local/include")
    includes = [flag for place in places if place and str(place) not in known for flag in ("-isystem", str(place))]
    return [*COMPILE_FLAGS, f"-DTORCH_EXTENSION_NAME={config.module}", f"-I{config.folder}", *includes]


def nvcc_flags(config: BuildConfig) -> list[str]:
    """Flags for one .cu file, which sees raw pointers and so no header but csrc's and CUDA's."""
    targets = [flag for arch in config.archs for flag in gencode(arch)]
    host = [flag for option in NVCC_HOST_FLAGS for flag in ("-Xcompiler", option)]
    return [*NVCC_FLAGS, *targets, *host, f"-I{config.folder}"]


def gencode(arch: str) -> list[str]:
    """nvcc's flags for one arch: machine code, and with +PTX also what a later GPU's driver compiles.

    >>> gencode("90+PTX")
    ['-gencode', 'arch=compute_90,code=[sm_90,compute_90]']
    """
    number = arch.removesuffix("+PTX")
    code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return ["-gencode", f"arch=compute_{number},code={code}"]


def link_flags(config: BuildConfig) -> list[str]:
    """Flags that link the objects. No rpath: torch is imported before the core, so its libraries are there."""
    cuda = [f"-L{config.nvcc.libraries}", *CUDA_LINK_FLAGS] if config.nvcc is not None else []
    return [LINK_FLAGS[0], f"-L{config.torch.root / 'lib'}", *LINK_FLAGS[1:], *cuda]
