"""What the CUDA core is built with here: the nvcc that fits torch, and archs for the GPUs that are present."""

from __future__ import annotations

from pathlib import Path

from pyft.core.build_config import BuildConfig, find_torch, make_cuda_config
from pyft.core.compile import BuildError
from pyft.core.cuda_archs import (
    ARCHS_WITHOUT_GPU,
    Capability,
    archs_for,
    archs_from_environment,
    present_capabilities,
    uncovered,
)
from pyft.core.nvcc import find_nvcc, known_archs, mend_nvcc
from pyft.errors import ConfigError

MEND_ARCHS = "unset PYFT_CUDA_ARCHS, or add the GPU's compute capability to it"


def cuda_config_ahead(folder: Path | None = None) -> BuildConfig:
    """The configuration of a build that may serve other machines: `PYFT_CUDA_ARCHS`, else GPUs here, else all.

    Raises:
        BuildError: `PYFT_CUDA_ARCHS` names something else than archs, or nvcc no longer serves a GPU here.
    """
    cuda = find_torch().cuda
    nvcc = find_nvcc(cuda)
    try:
        archs = archs_from_environment()
        if archs is None:
            archs = archs_for(_capabilities(), known_archs(nvcc) if nvcc is not None else []) or ARCHS_WITHOUT_GPU
    except ConfigError as error:
        raise BuildError(str(error), "set PYFT_CUDA_ARCHS to such as 80;90") from error
    return make_cuda_config(nvcc, archs, folder)


def _capabilities() -> list[Capability]:
    try:
        return present_capabilities()
    except (ImportError, AttributeError):
        # A torch that cannot be imported where packages are built tells nothing about the machine that will run them.
        return []


def cuda_config(folder: Path | None = None) -> BuildConfig:
    """The configuration of a build for this machine. Its `nvcc` is None where there is none.

    Args:
        folder: the sources; default: `build_config.source_folder()`.

    Raises:
        BuildError: there is nothing to compile for, or what `PYFT_CUDA_ARCHS` names does not run on a GPU here.
    """
    present = present_capabilities()
    cuda = find_torch().cuda
    if present and cuda is None:
        raise BuildError(
            "this torch is built without CUDA, and its GPU is not NVIDIA's", "pip install a torch for CUDA"
        )
    nvcc = find_nvcc(cuda)
    try:
        archs = archs_from_environment()
        if archs is None:
            archs = archs_for(present, known_archs(nvcc) if nvcc is not None else [])
    except ConfigError as error:
        raise BuildError(str(error), "set PYFT_CUDA_ARCHS to such as 80;90" if present else mend_nvcc(cuda)) from error
    if not archs:
        raise BuildError("there is no GPU to compile for", "set PYFT_CUDA_ARCHS to such as 80;90")
    lacking = uncovered(archs, present)
    if lacking is not None:
        named = ";".join(archs)
        error_text = f"PYFT_CUDA_ARCHS={named} gives no code for a GPU of compute capability {lacking[0]}.{lacking[1]}"
        raise BuildError(error_text, MEND_ARCHS)
    return make_cuda_config(nvcc, archs, folder)
