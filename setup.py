"""Builds a pure wheel that carries the C++ sources, or with PYFT_BUILD_CORE=1 a platform wheel with the core inside."""

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


def core_is_wanted() -> bool:
    """Whether PYFT_BUILD_CORE asks for the core to be built now."""
    value = os.environ.get("PYFT_BUILD_CORE", "0")
    if value not in ("", "0", "1"):
        sys.exit(f"PYFT_BUILD_CORE is '{value}': expected 1 (build the core now) or 0 (at first use)")
    return value == "1"


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


class BuildCore(build_ext):
    """Builds the core with the same sources and flags as the build at first use, and writes down what it fits."""

    def run(self) -> None:
        super().run()
        for extension in self.extensions:
            self.record(extension).write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")

    def record(self, extension: Extension) -> Path:
        return Path(self.get_ext_fullpath(extension.name)).with_name(build_config.AHEAD_OF_TIME_RECORD)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *(str(self.record(extension)) for extension in self.extensions)]

    def build_extension(self, ext: Extension) -> None:
        sys.path.insert(0, str(HERE))
        from pyft.core.build_config import make_config
        from pyft.core.compile import BuildError, compile_into, find_tools

        try:
            # The sources beside this file, not those of another checkout that PYFT_CSRC may name.
            config = make_config(HERE / "csrc")
        except ModuleNotFoundError as error:
            sys.exit(f"PYFT_BUILD_CORE=1: {error}, and pass --no-build-isolation to pip so that the build sees it")
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="pyft-build-") as folder:
            log = Path(folder, "build.log")
            print(f"compiling the core for torch {config.torch.version}", flush=True)
            try:
                library = compile_into(Path(folder), config, find_tools(), log)
            except BuildError as error:
                print(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "", file=sys.stderr)
                sys.exit(f"the core cannot be built: {error.failure.error}. Mend: {error.failure.mend}")
            shutil.copyfile(library, target)
        # What must be the same when the core is loaded.
        self.facts = {
            "digest": config.digest,
            "torch": config.torch.version,
            "python": sys.implementation.cache_tag,
        }


setup(
    ext_modules=[Extension("pyft._core", sources=[])] if core_is_wanted() else [],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildCore},
)
