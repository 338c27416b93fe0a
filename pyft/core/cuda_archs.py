"""For which GPUs the CUDA core is compiled: those present, or those that `PYFT_CUDA_ARCHS` names.

An arch is written as nvcc numbers it: "80", "90a"; "90+PTX" also carries PTX, which the driver of a later GPU compiles.
"""

from __future__ import annotations

import os
import re

from pyft.errors import ConfigError

Capability = tuple[int, int]

# Built ahead of time on a machine without a GPU: A100, RTX 30 and 40 run 80; H100 and all later ones 90 and its PTX.
ARCHS_WITHOUT_GPU = ("80", "90+PTX")


def parse_archs(text: str) -> tuple[str, ...]:
    """The archs that `PYFT_CUDA_ARCHS` names, in rising order, each once.

    >>> parse_archs("9.0+PTX; 80, sm_86")
    ('80', '86', '90+PTX')

    Raises:
        ConfigError: a word is not an arch, or there is none.
    """
    words = [word for word in re.split(r"[;,\s]+", text.strip()) if word]
    found: dict[str, bool] = {}
    for word in words:
        match = re.fullmatch(r"(?:sm_|compute_)?(\d{1,2})\.?(\d)([af]?)(\+PTX)?", word, flags=re.IGNORECASE)
        if match is None:
            raise ConfigError(
                f"PYFT_CUDA_ARCHS has '{word}': expected compute capabilities such as 80;90 or 8.0,9.0+PTX. "
                "Unset it to compile for the GPU that is present"
            )
        number = f"{match[1]}{match[2]}{match[3].lower()}"
        found[number] = found.get(number, False) or match[4] is not None
    if not found:
        raise ConfigError("PYFT_CUDA_ARCHS names no arch: expected such as 80;90, or unset it")
    ordered = sorted(found, key=lambda number: (int(number.rstrip("af")), number))
    return tuple(f"{number}+PTX" if found[number] else number for number in ordered)


def archs_from_environment() -> tuple[str, ...] | None:
    """What `PYFT_CUDA_ARCHS` asks for, or None where it is not set.

    Raises:
        ConfigError: it names something else than archs.
    """
    text = os.environ.get("PYFT_CUDA_ARCHS", "")
    return parse_archs(text) if text.strip() else None


def present_capabilities() -> list[Capability]:
    """Compute capability of each GPU that torch can use, each once, in rising order."""
    import torch

    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())})


def archs_for(capabilities: list[Capability], known: list[str]) -> tuple[str, ...]:
    """What to compile for these GPUs with an nvcc that knows the numbers `known` ("80", "86", ...).

    A GPU later than this nvcc gets PTX of the newest arch that it runs, which its driver compiles at first use.

    >>> archs_for([(9, 0), (13, 0)], ["80", "90", "120"])
    ('90', '120+PTX')

    Raises:
        ConfigError: this nvcc no longer compiles for one of them.
    """
    numbers = {int(number) for number in known if number.isdecimal()}
    archs: dict[str, bool] = {}
    for major, minor in capabilities:
        number = 10 * major + minor
        older = [one for one in numbers if one <= number]
        if numbers and not older:
            raise ConfigError(
                f"this nvcc compiles for compute capability {min(numbers) / 10:.1f} and later, the GPU has "
                f"{major}.{minor}. Install a torch for an older CUDA, and its nvcc"
            )
        chosen = number if number in numbers or not older else max(older)
        archs[str(chosen)] = archs.get(str(chosen), False) or chosen != number
    return tuple(f"{number}+PTX" if archs[number] else number for number in sorted(archs, key=int))


def covers(archs: tuple[str, ...] | list[str], capability: Capability) -> bool:
    """Whether a GPU runs code compiled for `archs`: machine code of its generation, not later than it, or older PTX.

    >>> covers(("80",), (8, 9)), covers(("80",), (9, 0)), covers(("80+PTX",), (9, 0)), covers(("90",), (8, 0))
    (True, False, True, False)
    """
    number = 10 * capability[0] + capability[1]
    for arch in archs:
        name, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        built = int(name.rstrip("af"))
        if name.endswith("a"):
            # Code for one arch and its special instructions runs on that one only.
            if built == number:
                return True
        elif built <= number and (ptx or built // 10 == capability[0]):
            return True
    return False


def uncovered(archs: tuple[str, ...] | list[str], capabilities: list[Capability]) -> Capability | None:
    """The first GPU that cannot run code compiled for `archs`, or None."""
    return next((capability for capability in capabilities if not covers(archs, capability)), None)
