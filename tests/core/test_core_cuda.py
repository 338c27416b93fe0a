"""Building and loading the CUDA core without a GPU: a stand-in torch that has some, and a stand-in nvcc that is g++."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pyft.core.build_config import gencode, source_digest
from pyft.core.cuda_archs import archs_for, archs_from_environment, covers, parse_archs
from pyft.core.nvcc import mend_nvcc
from pyft.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = """\
#include <Python.h>
#include <cuda_runtime_api.h>
long kernel();
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_core_cuda", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__core_cuda() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", kernel());
  return module;
}
"""
# As nvcc: tells its version, its folder and its archs, and hands what it compiles to g++.
NVCC = """\
#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
if "--version" in arguments:
    print("Cuda compilation tools, release {short}, V{release}")
elif "--dryrun" in arguments:
    print("#$ TOP={top}/bin/..", file=sys.stderr)
elif "--list-gpu-arch" in arguments:
    print("\\n".join("compute_" + arch for arch in "{archs}".split()))
else:
    with open("{calls}", "a") as file:
        file.write(" ".join(arguments) + "\\n")
    source, out = arguments[-3], arguments[-1]
    sys.exit(subprocess.run(["g++", "-fPIC", "-x", "c++", "-c", source, "-o", out]).returncode)
"""
LOAD = """\
import json, os, sys, warnings
from pyft.core import nvcc
nvcc.USUAL_PLACE = "/nowhere"
from pyft.core.loader import load_core, load_core_for
from pyft.errors import PyftError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        found, error = [load_core_for("cuda") for _ in range(3)], None
    except PyftError as raised:
        found, error = [None], f"{type(raised).__name__}: {raised}"
print(json.dumps({"answer": getattr(found[0], "answer", None), "same": len({id(one) for one in found}) == 1,
    "path": getattr(found[0], "__file__", None), "error": error, "warnings": [str(one.message) for one in caught]}))
"""
WHEELS = '"nvidia-cuda-nvcc==13.0.*" "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-cccl==13.0.*"'


def write_toolkit(top: Path, release: str = "13.0.88", archs: str = "75 80 86 89 90 100") -> Path:
    """A folder as of CUDA, whose nvcc writes its calls into the file `calls`."""
    for folder in ("bin", "include", "lib64"):
        (top / folder).mkdir(parents=True)
    for header in ("cuda_runtime.h", "cuda_runtime_api.h"):
        (top / "include" / header).write_text("#pragma once\n")
    subprocess.run(["ar", "rcs", str(top / "lib64" / "libcudart_static.a")], check=True)
    short = ".".join(release.split(".")[:2])
    text = NVCC.format(python=sys.executable, short=short, release=release, top=top, archs=archs, calls=top / "calls")
    (top / "bin" / "nvcc").write_text(text)
    (top / "bin" / "nvcc").chmod(0o755)
    return top


def calls(top: Path) -> list[str]:
    return (top / "calls").read_text().splitlines() if (top / "calls").exists() else []


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    return write_toolkit(tmp_path / "cuda")


@pytest.fixture
def gpu_box(box: Any, tmp_path: Path, write_torch_version: Any) -> Any:
    """A box with a torch for CUDA 13.0, a GPU of compute capability 9.0, sources of both cores, and no nvcc."""
    site = tmp_path / "site"
    shutil.copytree(box.site, site)
    write_torch_version(site, "2.13.0", "13.0")
    box.site = site
    (box.folder / "csrc" / "bindings_cuda.cpp").write_text(MODULE)
    (box.folder / "csrc" / "kernel_cuda.cu").write_text('#include "answer.h"\nlong kernel() { return kAnswer; }\n')
    (tmp_path / "bin").mkdir()
    for name in ("g++", "as", "ld", "sh", "ar"):
        (tmp_path / "bin" / name).symlink_to(Path(str(shutil.which(name))).resolve())
    box.variables = {"GPUS": "9.0", "PATH": str(tmp_path / "bin")}
    return box


def load(box: Any, **changes: str | None) -> Any:
    done = box.run(LOAD, **changes)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"said": done.stderr}


def test_first_cuda_tensor_compiles_for_the_gpu_present(gpu_box: Any, toolkit: Path) -> None:
    told = load(gpu_box, CUDA_HOME=str(toolkit))
    assert told["answer"] == 42, told
    assert told["same"]
    assert told["warnings"] == []
    entry = gpu_box.entry()
    lines = told["said"].splitlines()
    assert lines[0] == (f"pyft: compiling the CUDA core for 90 (once, about half a minute), log: {entry / 'build.log'}")
    assert lines[1].startswith("pyft: CUDA core ready in ")
    assert len(lines) == 2
    (call,) = calls(toolkit)
    assert "-gencode arch=compute_90,code=sm_90 " in call
    assert "--fmad=false" in call
    assert "fast" not in call
    assert "torch" not in call
    assert {path.name for path in entry.iterdir()} == {"_core_cuda.so", "build.log", "complete.json"}
    marker = json.loads((entry / "complete.json").read_text())
    assert (marker["nvcc"], marker["archs"]) == ("13.0.88", ["90"])
    assert "nvcc 13.0.88 at " in (entry / "build.log").read_text()
    again = load(gpu_box, CUDA_HOME=str(toolkit))
    assert (again["path"], again["said"]) == (told["path"], "")
    # Whoever has no nvcc uses what another machine compiled.
    assert load(gpu_box)["path"] == told["path"]
    assert len(calls(toolkit)) == 1


def test_other_nvcc_and_other_gpu_are_other_entries(gpu_box: Any, toolkit: Path, tmp_path: Path) -> None:
    first = load(gpu_box, CUDA_HOME=str(toolkit))["path"]
    newer = write_toolkit(tmp_path / "newer", "13.1.20")
    second = load(gpu_box, CUDA_HOME=str(newer))["path"]
    third = load(gpu_box, CUDA_HOME=str(newer), GPUS="8.0 9.0 8.0")["path"]
    assert len({first, second, third}) == 3
    assert "arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 " in calls(newer)[1]


def test_sources_of_one_core_do_not_rebuild_the_other(gpu_box: Any, toolkit: Path) -> None:
    folder = gpu_box.folder / "csrc"
    before = [source_digest(folder, module) for module in ("_core", "_core_cuda")]
    (folder / "kernel_cuda.cu").write_text("long kernel() { return 7; }\n")
    assert source_digest(folder) == before[0]
    assert source_digest(folder, "_core_cuda") != before[1]
    assert load(gpu_box, CUDA_HOME=str(toolkit))["answer"] == 7
    assert gpu_box.load()["answer"] == 42
    (folder / "answer.h").write_text("constexpr long kAnswer = 43;\n")
    assert source_digest(folder) != before[0]


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "PATH", "usual place", "wheel"])
def test_nvcc_is_found_wherever_it_is(gpu_box: Any, tmp_path: Path, variable: str) -> None:
    code, changes = LOAD, {}
    if variable == "wheel":
        write_toolkit(gpu_box.site / "nvidia" / "cu13")
    else:
        top = write_toolkit(tmp_path / "somewhere")
        if variable == "PATH":
            # A script or a link may lead to it, as in /usr/local/bin.
            (tmp_path / "bin" / "nvcc").symlink_to(top / "bin" / "nvcc")
        elif variable == "usual place":
            code = code.replace("/nowhere", str(top))
        else:
            changes[variable] = str(top)
    done = gpu_box.run(code, **changes)
    assert json.loads(done.stdout)["answer"] == 42, done.stdout + done.stderr


def test_nvcc_that_fits_torch_comes_before_one_that_does_not(gpu_box: Any, tmp_path: Path) -> None:
    old = write_toolkit(tmp_path / "old", "12.8.93")
    new = write_toolkit(gpu_box.site / "nvidia" / "cu13")
    (tmp_path / "bin" / "nvcc").symlink_to(old / "bin" / "nvcc")
    assert load(gpu_box)["answer"] == 42
    assert len(calls(new)) == 1
    assert calls(old) == []


def test_nvcc_of_another_cuda_is_refused_by_name(gpu_box: Any, tmp_path: Path) -> None:
    old = write_toolkit(tmp_path / "old", "12.8.93")
    told = load(gpu_box, CUDA_HOME=str(old))
    assert told["answer"] is None
    (warning,) = told["warnings"]
    assert f"nvcc 12.8.93 at {old}/bin/nvcc does not fit torch's CUDA 13.0: the first numbers differ" in warning
    assert f"Mend: pip install {WHEELS}" in warning


def test_without_nvcc_one_warning_names_the_mend(gpu_box: Any) -> None:
    told = load(gpu_box)
    assert told["answer"] is None
    (warning,) = told["warnings"]
    assert warning.startswith(
        "pyft: the CUDA core cannot be used: nvcc is missing (looked in CUDA_HOME, CUDA_PATH, PATH"
    )
    assert f"Mend: pip install {WHEELS}, or install CUDA 13.0 and set CUDA_HOME" in warning
    assert "the slower PyTorch reference computes the same on the GPU (PYFT_CORE=off silences this)." in warning
    assert told["said"] == ""
    # The core of the CPU is another matter.
    assert gpu_box.load()["answer"] == 42


def test_core_mode_holds_for_cuda(gpu_box: Any, toolkit: Path) -> None:
    told = load(gpu_box, PYFT_CORE="require")
    assert told["error"].startswith("CoreError: the CUDA core cannot be used: nvcc is missing")
    assert told["warnings"] == []
    told = load(gpu_box, PYFT_CORE="off", CUDA_HOME=str(toolkit))
    assert (told["answer"], told["error"], told["warnings"], told["said"]) == (None, None, [], "")
    assert calls(toolkit) == []


@pytest.mark.parametrize("file", ["include/cuda_runtime.h", "lib64/libcudart_static.a"])
def test_half_a_toolkit_is_named(gpu_box: Any, toolkit: Path, file: str) -> None:
    (toolkit / file).unlink()
    (warning,) = load(gpu_box, CUDA_HOME=str(toolkit))["warnings"]
    assert f"{Path(file).name} is missing beside nvcc {toolkit}/bin/nvcc. Mend: pip install {WHEELS}" in warning
    assert calls(toolkit) == []


def test_compile_error_is_named_remembered_and_tried_again_with_another_nvcc(gpu_box: Any, toolkit: Path) -> None:
    (gpu_box.folder / "csrc" / "kernel_cuda.cu").write_text("long kernel( { return 1; }\n")
    first = load(gpu_box, CUDA_HOME=str(toolkit))
    (warning,) = first["warnings"]
    assert "kernel_cuda.cu:1:" in warning
    assert ": error: " in warning
    assert (gpu_box.entry() / "failed.json").exists()
    assert load(gpu_box, CUDA_HOME=str(toolkit))["warnings"] == first["warnings"]
    assert len(calls(toolkit)) == 1
    os.utime(toolkit / "bin" / "nvcc")
    load(gpu_box, CUDA_HOME=str(toolkit))
    assert len(calls(toolkit)) == 2


def test_archs_of_the_environment(gpu_box: Any, toolkit: Path) -> None:
    told = load(gpu_box, CUDA_HOME=str(toolkit), PYFT_CUDA_ARCHS="8.0,9.0+PTX")
    assert told["answer"] == 42
    assert "code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90] " in calls(toolkit)[0]
    (warning,) = load(gpu_box, CUDA_HOME=str(toolkit), PYFT_CUDA_ARCHS="80;86")["warnings"]
    assert "PYFT_CUDA_ARCHS=80;86 gives no code for a GPU of compute capability 9.0. Mend: unset PYFT_CUDA" in warning
    (warning,) = load(gpu_box, CUDA_HOME=str(toolkit), PYFT_CUDA_ARCHS="hopper")["warnings"]
    assert "PYFT_CUDA_ARCHS has 'hopper': expected compute capabilities such as 80;90 or 8.0,9.0+PTX" in warning
    # A machine without a GPU compiles for others where it is told for which.
    assert load(gpu_box, CUDA_HOME=str(toolkit), GPUS="", PYFT_CUDA_ARCHS="80")["answer"] == 42
    (warning,) = load(gpu_box, CUDA_HOME=str(toolkit), GPUS="")["warnings"]
    assert "there is no GPU to compile for. Mend: set PYFT_CUDA_ARCHS to such as 80;90" in warning


def test_gpu_that_this_nvcc_does_not_know(gpu_box: Any, toolkit: Path) -> None:
    assert load(gpu_box, CUDA_HOME=str(toolkit), GPUS="12.0")["answer"] == 42
    assert "arch=compute_100,code=[sm_100,compute_100] " in calls(toolkit)[0]
    (warning,) = load(gpu_box, CUDA_HOME=str(toolkit), GPUS="7.0")["warnings"]
    assert "this nvcc compiles for compute capability 7.5 and later, the GPU has 7.0. Install a torch for an" in warning


def test_gpu_that_is_not_nvidias(gpu_box: Any, toolkit: Path, write_torch_version: Any) -> None:
    write_torch_version(gpu_box.site, "2.13.0", None)
    (warning,) = load(gpu_box, CUDA_HOME=str(toolkit))["warnings"]
    assert "this torch is built without CUDA, and its GPU is not NVIDIA's" in warning


def doctor_rows(box: Any, **changes: str) -> dict[str, str]:
    code = (
        "import sys\nfrom pyft.core import nvcc\nnvcc.USUAL_PLACE = '/nowhere'\n"
        "from pyft.core.doctor import doctor\nprint('code', doctor())"
    )
    done = box.run(code, **changes)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = {}
    label = ""
    for line in done.stdout.splitlines():
        label = line[:12].strip() or label
        found[label] = f"{found[label]} {line[12:]}" if label in found else line[12:]
    return found | {"code": done.stdout.split()[-1]}


def test_doctor_tells_of_gpu_nvcc_and_core(gpu_box: Any, toolkit: Path) -> None:
    told = doctor_rows(gpu_box, CUDA_HOME=str(toolkit))
    assert told["GPU"] == "fake, 16 GiB, compute capability 9.0"
    assert told["nvcc"] == f"13.0.88 at {toolkit}/bin/nvcc, for 75 to 100; fits torch's CUDA 13.0"
    assert told["CUDA core"].startswith("ready, built now: ")
    assert told["CUDA core"].endswith("_core_cuda.so; GPUs of compute capability 9.0")
    assert told["code"] == "0"
    assert doctor_rows(gpu_box, GPUS="")["CUDA core"] == "not used: there is no GPU"
    shutil.rmtree(gpu_box.cache)
    told = doctor_rows(gpu_box)
    assert told["CUDA core"].startswith("cannot be used: nvcc is missing")
    assert told["nvcc"].startswith("missing (looked in CUDA_HOME")
    assert told["next"].startswith("pip install")
    assert told["code"] == "1"


@pytest.mark.parametrize("how", ["asked for", "found", "left out", "no nvcc"])
def test_cuda_core_built_ahead_of_time(gpu_box: Any, toolkit: Path, tmp_path: Path, how: str) -> None:
    checkout = tmp_path / "checkout"
    skip = shutil.ignore_patterns("__pycache__", "*.so", "_core*.json", "_csrc")
    shutil.copytree(REPOSITORY / "pyft", checkout / "pyft", ignore=skip)
    shutil.copytree(gpu_box.folder / "csrc", checkout / "csrc")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, checkout / name)
    asked = {"asked for": "1", "left out": "0"}.get(how)
    changes = {"PYFT_BUILD_CORE": "1", "GPUS": "", **({"PYFT_BUILD_CUDA": asked} if asked else {})}
    # The machine's own toolkit is not to be found.
    usual = "from pyft.core import nvcc\nnvcc.USUAL_PLACE = '/nowhere'\n"
    code = f"import sys\nsys.path.insert(0, '.')\n{usual}from setuptools import build_meta\nbuild_meta.build_wheel('.')"
    environment = gpu_box.environment(**changes, **({} if how == "no nvcc" else {"CUDA_HOME": str(toolkit)}))
    environment["PYTHONPATH"] = str(gpu_box.site)
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = checkout.glob("*.whl")
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if name.startswith("pyft/_core")}
        file.extractall(tmp_path / "installed")
    with_cuda = how in ("asked for", "found")
    assert (f"pyft/_core_cuda{suffix}" in held, "pyft/_core_cuda.json" in held) == (with_cuda, with_cuda)
    assert f"pyft/_core{suffix}" in held
    if how == "no nvcc":
        assert "the CUDA core is not built: nvcc is missing" in done.stderr
    if not with_cuda:
        return
    assert "code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90]" in calls(toolkit)[0]
    gpu_box.package = tmp_path / "installed"
    told = load(gpu_box, PYFT_CSRC=None, GPUS="8.6 12.0")
    assert told["path"] == str(tmp_path / "installed" / "pyft" / f"_core_cuda{suffix}")
    assert told["said"] == ""
    told = load(gpu_box, PYFT_CSRC=None, GPUS="7.5", CUDA_HOME=str(toolkit))
    assert told["said"].startswith(
        "pyft: the CUDA core built ahead of time is not used: it was built for 80, 90+PTX, a GPU here has 7.5\n"
    )
    assert told["answer"] == 42


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80;90", ("80", "90")),
        ("8.0,9.0+PTX", ("80", "90+PTX")),
        ("sm_90a 100 compute_86;8.6", ("86", "90a", "100")),
        ("90;9.0+ptx", ("90+PTX",)),
        ("12.0", ("120",)),
    ],
)
def test_words_for_archs(text: str, archs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_archs(text) == archs
    monkeypatch.setenv("PYFT_CUDA_ARCHS", text)
    assert archs_from_environment() == archs
    monkeypatch.setenv("PYFT_CUDA_ARCHS", " ")
    assert archs_from_environment() is None


@pytest.mark.parametrize("text", ["native", "8", "80-90", "9.0.1", ";"])
def test_words_that_are_no_archs(text: str) -> None:
    with pytest.raises(ConfigError, match="PYFT_CUDA_ARCHS"):
        parse_archs(text)


def test_what_runs_where() -> None:
    assert [covers(("80",), gpu) for gpu in ((7, 5), (8, 0), (8, 9), (9, 0))] == [False, True, True, False]
    assert [covers(("90a",), gpu) for gpu in ((9, 0), (10, 0))] == [True, False]
    assert [covers(("75", "90+PTX"), gpu) for gpu in ((8, 0), (9, 0), (12, 0))] == [False, True, True]
    assert archs_for([(8, 9), (9, 0)], []) == ("89", "90")
    assert gencode("90a") == ["-gencode", "arch=compute_90a,code=sm_90a"]
    assert mend_nvcc("12.6").startswith("conda install -c nvidia cuda-toolkit=12.6")
