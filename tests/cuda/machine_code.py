"""What nvcc made of the kernels: registers, stack, and wide accesses, read with cuobjdump."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from pyft.core.nvcc import nvcc_places

# Anonymous namespaces are named after their file, in an order of letters that says how long a name is.
KERNEL = re.compile(r"\d((?:[a-z]+_)+kernel)(I.*?)?E+v")


@dataclass
class Kernel:
    """One kernel compiled for one arch. `name` is mangled; `accesses` counts LDG, STG, LDL, STL and CALL by width."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    accesses: dict[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The function's own name, without namespaces and arguments."""
        found = re.search(r"([a-z_]+_kernel)", re.sub(r"^_ZN4pyft\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}\d+", "", self.name))
        return found[1] if found else self.name

    def has(self, access: str) -> bool:
        """Whether an instruction such as "LDG.E.128" is there, whatever its cache hints."""
        wanted = access.split(".")
        return any(set(wanted) <= set(one.split(".")) for one in self.accesses)


def find_cuobjdump() -> tuple[str, dict[str, str]] | None:
    """cuobjdump, and an environment in which it finds nvdisasm; None where either is missing."""
    # PyPI's wheels of the two bring no nvcc, and are not on PATH.
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
    folders = [str(Path(place).parent) for place in nvcc_places()]
    folders += [str(folder) for place in wheels for folder in sorted(place.glob("cu*/bin"), reverse=True)]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    program = shutil.which("cuobjdump", path=path)
    return (program, os.environ | {"PATH": path}) if program and shutil.which("nvdisasm", path=path) else None


def read_kernels(library: Path, tool: tuple[str, dict[str, str]]) -> list[Kernel]:
    """Every kernel in `library`, once for each arch."""

    def ask(flag: str) -> str:
        done = subprocess.run([tool[0], flag, str(library)], env=tool[1], capture_output=True, text=True, check=True)
        return done.stdout

    kernels: dict[tuple[str, str], Kernel] = {}
    arch, name = "", ""
    for line in ask("--dump-resource-usage").splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif numbers := dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", line)):
            sizes = (int(numbers[key]) for key in ("REG", "STACK", "LOCAL"))
            kernels[arch, name] = Kernel(name, arch, *sizes)
    kernel = None
    for line in ask("-sass").splitlines():
        if found := re.match(r"\s*code for sm_(\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels[arch, found[1]]
        elif kernel and (
            found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?((?:LDG|STG|LDL|STL|CALL)[.\w]*)", line)
        ):
            kernel.accesses[found[1]] = kernel.accesses.get(found[1], 0) + 1
    return list(kernels.values())
