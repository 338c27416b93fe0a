"""Who may import or include whom: the picture in docs/architecture.md, held against the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PLAIN = {"errors", "samples", "target_scale", "version"}
# Folder of pyft -> the folders and modules of pyft that it may import, beside itself and the plain ones.
MAY_IMPORT = {
    "core": set(),
    "ops": {"core"},
    "optim": {"core", "ops"},
    "freezing": {"core", "ops"},
    "models": {"core"},
    "data": {"core"},
    "evaluation": {"core"},
    "report": {"core"},
    "explain": {"core", "report"},
    "export": {"core"},
    "onnx_runtime": {"core", "data", "evaluation", "export"},
    "training": {"core", "ops", "optim", "freezing"},
}
CLI = {"cli", "cli_arguments", "__main__"}
SOURCES = sorted((REPOSITORY / "pyft").rglob("*.py"))


def imported_parts(path: Path) -> set[str]:
    """First names below `pyft` that a file imports, wherever in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "pyft":
                names = [f"pyft.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("pyft.")}
    return parts


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_go_downwards(path: Path) -> None:
    top = path.relative_to(REPOSITORY / "pyft").parts[0].removesuffix(".py")
    imports = imported_parts(path)
    if top in MAY_IMPORT:
        assert imports <= MAY_IMPORT[top] | PLAIN | {top}
    elif top in PLAIN:
        assert imports <= PLAIN
    elif top not in CLI | {"__init__", "quickstart", "quickstart_stages"}:
        assert not imports & CLI


def test_every_folder_is_in_the_picture() -> None:
    folders = {p.name for p in (REPOSITORY / "pyft").iterdir() if (p / "__init__.py").is_file()}
    assert folders - {"quickstart_data"} == set(MAY_IMPORT)


def test_torch_headers_stay_out_of_kernels() -> None:
    kernels = [
        p
        for p in (REPOSITORY / "csrc").iterdir()
        if re.search(r"(_math\.h|_cpu\.(h|cpp)|\.cu|chunks\.h|host_device\.h|cuda_launch\.h)$", p.name)
    ]
    # Of CUDA's headers, those that a kernel sees; the others serve its host code.
    included = set(
        re.findall(r'#include "(\w+_cuda\.h)"', "".join(p.read_text() for p in kernels if p.suffix == ".cu"))
    )
    kernels += [REPOSITORY / "csrc" / name for name in sorted(included)]
    assert len(kernels) >= 6
    for path in kernels:
        assert not re.search(r"#include [<\"](torch|ATen|c10|pybind11)/", path.read_text()), path.name


def test_the_cpu_core_sees_no_header_of_cuda() -> None:
    from pyft.core.build_config import belongs_to_cuda

    for path in (REPOSITORY / "csrc").iterdir():
        if not belongs_to_cuda(path):
            found = re.findall(r'#include "([^"]*_cuda\.h|cuda_[^"]*)"', path.read_text())
            assert not found, f"{path.name} includes {found}, whose changes do not rebuild the CPU core"


def test_csrc_uses_the_stable_interface_only() -> None:
    allowed = r"<(torch/csrc/stable/|torch/headeronly/|torch/csrc/inductor/aoti_torch/c/shim)"
    for path in (REPOSITORY / "csrc").iterdir():
        for include in re.findall(r"#include (<(?:torch|ATen|c10)/[^>]*>)", path.read_text()):
            assert re.match(allowed, include), f"{path.name} includes {include}"


def test_bench_and_examples_use_public_names() -> None:
    import pyft

    # Not dir(): what other tests have imported is in there, too.
    public = {*pyft.__all__, "models", "data"}
    for path in [*(REPOSITORY / "bench").glob("*.py"), *(REPOSITORY / "examples").glob("*.py")]:
        assert imported_parts(path) <= public, path.name


def test_no_file_is_too_long_and_no_drawer_for_odds_and_ends() -> None:
    for path in [*SOURCES, *(REPOSITORY / "csrc").iterdir()]:
        assert path.stem not in {"utils", "util", "common", "helpers", "misc"}, path
        assert len(path.read_text().splitlines()) <= 500, path
