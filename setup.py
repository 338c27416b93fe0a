"""Builds a pure wheel that carries the sources, or with PYFT_BUILD_CORE=1 a platform wheel with the core inside.

With PYFT_BUILD_CORE=1 the CUDA core is built, too, where torch has CUDA and nvcc is found; PYFT_BUILD_CUDA=1 asks for
it whatever torch it is, PYFT_BUILD_CUDA=0 leaves it out. PYFT_CUDA_ARCHS names the GPUs; else those present; else all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


def load_build_config() -> ModuleType:
    """pyft/core/build_config.py by its path: torch need not be installed to build the pure wheel."""
    spec = importlib.util.spec_from_file_location("pyft_build_config", HERE / "pyft" / "core" / "build_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def switch(name: str, meaning: str) -> bool | None:
    """The variable `name` as 1 or 0; None where it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name} is '{value}': expected 1 ({meaning}) or 0")
    return value == "1" if value else None


def wanted_modules() -> list[str]:
    """The cores to be built now."""
    core = switch("PYFT_BUILD_CORE", "build the core now; 0: at first use")
    cuda = switch("PYFT_BUILD_CUDA", "build the CUDA core, too")
    if not core:
        return []
    return [build_config.MODULE, *([build_config.CUDA_MODULE] if cuda or (cuda is None and cuda_is_possible()) else [])]


def cuda_is_possible() -> bool:
    """Whether torch has CUDA and a fitting nvcc is there. Where only nvcc is lacking, a line says so."""
    sys.path.insert(0, str(HERE))
    from pyft.core.nvcc import find_nvcc, why_not

    try:
        cuda = build_config.find_torch().cuda
    except ModuleNotFoundError:
        return False
    problem = why_not(find_nvcc(cuda), cuda) if cuda is not None else None
    if problem is not None:
        print(f"the CUDA core is not built: {problem[0]}. Mend: {problem[1]}", file=sys.stderr)
    return cuda is not None and problem is None


build_config = load_build_config()


class BuildPackage(build_py):
    """Copies csrc into the package, where the build at first use looks for it."""

    def copies(self) -> dict[str, str]:
        """Target in the package -> source in the checkout."""
        if self.editable_mode:
            return {}
        target = Path(self.build_lib, "pyft", build_config.PACKAGED_SOURCES)
        return {str(target / path.name): str(path) for path in build_config.source_files(HERE / "csrc")}

    def run(self) -> None:
        super().run()
        copies = self.copies()
        # A source that was removed since the last build must not stay in the wheel.
        shutil.rmtree(Path(self.build_lib, "pyft", build_config.PACKAGED_SOURCES), ignore_errors=True)
        for target, source in copies.items():
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self.copies()]


class BuildCores(build_ext):
    """Builds the cores with the same sources and flags as the build at first use, and writes down what they fit."""

    def run(self) -> None:
        self.facts: dict[str, dict[str, object]] = {}
        super().run()
        for extension in self.extensions:
            self.record(extension).write_text(json.dumps(self.facts[extension.name], indent=2) + "\n", encoding="utf-8")

    def record(self, extension: Extension) -> Path:
        name = build_config.record_name(extension.name.removeprefix("pyft."))
        return Path(self.get_ext_fullpath(extension.name)).with_name(name)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *(str(self.record(extension)) for extension in self.extensions)]

    def build_extension(self, ext: Extension) -> None:
        sys.path.insert(0, str(HERE))
        from pyft.core.build_config import make_config
        from pyft.core.compile import BuildError, compile_into, find_tools
        from pyft.core.cuda_build import cuda_config_ahead

        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="pyft-build-") as folder:
            log = Path(folder, "build.log")
            try:
                # The sources beside this file, not those of another checkout that PYFT_CSRC may name.
                make = cuda_config_ahead if ext.name.endswith(build_config.CUDA_MODULE) else make_config
                config = make(HERE / "csrc")
                what = f"the CUDA core for {', '.join(config.archs)}" if config.archs else "the core"
                print(f"compiling {what}, torch {config.torch.version}", flush=True)
                library = compile_into(Path(folder), config, find_tools(config.nvcc), log)
            except ModuleNotFoundError as error:
                sys.exit(f"PYFT_BUILD_CORE=1: {error}, and pass --no-build-isolation to pip so that the build sees it")
            except BuildError as error:
                print(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "", file=sys.stderr)
                sys.exit(f"the core cannot be built: {error.failure.error}. Mend: {error.failure.mend}")
            shutil.copyfile(library, target)
        # What must be the same when the core is loaded, and the GPUs that it serves.
        self.facts[ext.name] = {
            "digest": config.digest,
            "torch": config.torch.version,
            "python": sys.implementation.cache_tag,
            **({"archs": list(config.archs)} if config.archs else {}),
        }


setup(
    ext_modules=[Extension(f"pyft.{module}", sources=[]) for module in wanted_modules()],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildCores},
)
