"""Finding nvcc, its headers and its runtime library, wherever a toolkit, conda or PyPI's wheels put them."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pyft.core.build_config import Nvcc

USUAL_PLACE = "/usr/local/cuda"
RUNTIME = "libcudart_static.a"


def find_nvcc(cuda: str | None) -> Nvcc | None:
    """The first nvcc whose major version is that of `cuda` ("13.0"; None: any); else the first one; else None.

    Looked for in `CUDA_HOME` and `CUDA_PATH`, on PATH, in /usr/local/cuda, and in the wheels of PyPI. The one that
    `CUDA_HOME` or `CUDA_PATH` names is taken whatever its version: it was asked for.
    """
    found = [examine_nvcc(path) for path in nvcc_places()]
    usable = [nvcc for nvcc in found if nvcc is not None]
    named = tuple(os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
    asked_for = next((nvcc for nvcc in usable if named and nvcc.path.startswith(named)), None)
    fitting = next((nvcc for nvcc in usable if cuda is None or major(nvcc.release) == major(cuda)), None)
    return asked_for or fitting or (usable[0] if usable else None)


def nvcc_places() -> list[str]:
    """Paths of every nvcc on this machine, in the order in which they are tried."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    on_path = shutil.which("nvcc")
    places += [on_path] if on_path else []
    places += [str(Path(USUAL_PLACE, "bin", "nvcc")), *(str(path) for path in wheel_places())]
    return [place for place in dict.fromkeys(places) if os.access(place, os.X_OK) and Path(place).is_file()]


def wheel_places() -> Iterator[Path]:
    """Where PyPI's nvidia-cuda-nvcc puts nvcc: nvidia/cu13/bin. Its wheels for CUDA 12 hold no nvcc."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        yield from sorted(Path(place).glob("cu*/bin/nvcc"), reverse=True)


def major(release: str) -> str:
    """
    >>> major("13.0.88")
    '13'
    """
    return release.partition(".")[0]


@functools.lru_cache
def examine_nvcc(path: str) -> Nvcc | None:
    """Ask an nvcc for its release and where its toolkit is. None where it cannot be run."""
    told = _ask(path, "--version")
    release = re.search(r"\bV(\d+\.\d+(?:\.\d+)?)", told) or re.search(r"release (\d+\.\d+)", told)
    if release is None:
        return None
    # nvcc may be a script or a link that leads elsewhere: only nvcc knows where its toolkit is.
    top = re.search(r"^#\$ TOP=(.+)$", _ask(path, "--dryrun", "-x", "cu", os.devnull), flags=re.MULTILINE)
    root = Path(top[1]).resolve() if top else Path(path).resolve().parents[1]
    target = f"targets/{'sbsa' if platform.machine() == 'aarch64' else platform.machine()}-linux"
    include = _first(root, ("include", f"{target}/include"), "cuda_runtime.h")
    libraries = ("lib64", "lib", f"{target}/lib", f"lib/{platform.machine()}-linux-gnu")
    return Nvcc(path, release[1], include, _first(root, libraries, RUNTIME))


def _ask(path: str, *arguments: str) -> str:
    """What a program says on either stream, or "" where it cannot be run."""
    try:
        done = subprocess.run([path, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _first(root: Path, folders: tuple[str, ...], file: str) -> Path | None:
    return next((root / folder for folder in folders if (root / folder / file).is_file()), None)


def known_archs(nvcc: Nvcc) -> list[str]:
    """Numbers of the archs that this nvcc compiles for, such as "80"; empty where it does not say."""
    return re.findall(r"compute_(\d+)\b", _ask(nvcc.path, "--list-gpu-arch"))


def mend_nvcc(cuda: str | None) -> str:
    """What to install, for torch's CUDA ("13.0"), so that there is an nvcc.

    >>> mend_nvcc("13.0").partition(",")[0]
    'pip install "nvidia-cuda-nvcc==13.0.*" "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-cccl==13.0.*"'
    """
    release = ".".join((cuda or "13.0").split(".")[:2])
    if int(major(release)) < 13:
        # The wheels for CUDA 12 hold ptxas and no nvcc.
        return (
            f"conda install -c nvidia cuda-toolkit={release}, or install CUDA {release} and set CUDA_HOME to its folder"
        )
    wheels = " ".join(
        f'"{name}=={release}.*"' for name in ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
    )
    return f"pip install {wheels}, or install CUDA {release} and set CUDA_HOME to its folder"


def why_not(nvcc: Nvcc | None, cuda: str | None) -> tuple[str, str] | None:
    """Error and mend where this nvcc cannot build for torch's CUDA (None: built without, any nvcc will do), or None.

    Args:
        nvcc: what `find_nvcc` gave.
        cuda: `torch.version.cuda`.
    """
    mend = mend_nvcc(cuda)
    if nvcc is None:
        return "nvcc is missing (looked in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and PyPI's wheels)", mend
    if cuda is not None and major(nvcc.release) != major(cuda):
        return f"nvcc {nvcc.release} at {nvcc.path} does not fit torch's CUDA {cuda}: the first numbers differ", mend
    if nvcc.include is None:
        return f"cuda_runtime.h is missing beside nvcc {nvcc.path}", mend
    if nvcc.libraries is None:
        return f"{RUNTIME} is missing beside nvcc {nvcc.path}", mend
    return None
