"""The real CUDA sources under the real nvcc: they build, load beside the CPU wheel, and give the machine code meant."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from machine_code import Kernel, find_cuobjdump, read_kernels

from pyft.core.build_config import make_cuda_config, source_folder
from pyft.core.compile import build_cached
from pyft.core.nvcc import find_nvcc, why_not

pytestmark = pytest.mark.build

REPOSITORY = Path(__file__).resolve().parents[2]
ARCHS = ("80+PTX", "90")
# Kernels whose work is a few numbers for each tensor, chunk or column, and those that follow an index or a window.
FEW_NUMBERS = {"decision_kernel", "finish_largest_kernel", "finish_norm_kernel", "finish_sums_kernel"}
LOADS_BY_PLACE = {"backward_planes_kernel", "pool_kernel", "backward_last_kernel"}
STORES_FEW = {"sum_kernel", "largest_kernel", "row_norms_kernel"}
# Planes that do not begin at 16 bytes, element by element.
ONE_AT_A_TIME = "Li1E"
# Ops of the CPU core that the CUDA core does not have, and why.
PACKED = "a GPU's own libraries pack as they multiply; it serves CPUs on which torch's product stays below the peak"
PADDING = (
    "it leaves out padding in packed products on the CPU; on a GPU nothing was measured that beats cuBLAS on all tokens"
)
GELU = "torch's GELU on a GPU waits for memory alone"
ATTENTION = "torch's flash and memory-efficient kernels serve GPUs; on the CPU its kernel is made for long sequences"
CPU_ALONE = {
    "pyft::bernoulli_bits": "torch's draws on CUDA depend on the grid that torch chooses: native_dropout makes them",
    "pyft::gelu": GELU,
    "pyft::gelu_backward": GELU,
    "pyft::pack_linear": PACKED,
    "pyft::packed_linear": PACKED,
    "pyft::token_linear": PADDING,
    "pyft::token_linear_backward": PADDING,
    "pyft::short_attention": ATTENTION,
    "pyft::short_attention_backward": ATTENTION,
    "pyft::partial_weight_gradient": "on a GPU gather_columns gathers the chosen rows in one kernel, with their sums, "
    "and cuBLAS multiplies them through torch's mm: no gather inside of a matrix product is measured faster",
}
# The update of tensors of which nothing is wider than 16 bits: four elements a thread, 8 bytes.
ALL_NARROW = re.compile(r"FixedLayout.*WeightFormatE[1-5].*MomentFormatE[23]E")
# In the mangled name of kernels that write one bit for each element and nothing else.
WRITES_BITS = "TestRule"
LOAD = """\
import json, sys, torch, pyft.ops, pyft.optim
from pyft.core.loader import import_library, load_core
core = load_core()
missing = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyft::")]
has = torch._C._dispatch_has_kernel_for_dispatch_key
before = [name for name in missing if has(name, "CUDA")]
info = import_library(__import__("pathlib").Path(sys.argv[1]), "_core_cuda").build_info()
print(json.dumps({"info": info, "before": before,
    "composite": [name for name in missing if has(name, "CompositeExplicitAutograd")],
    "cpu": [name for name in missing if has(name, "CPU")], "cuda": [name for name in missing if has(name, "CUDA")]}))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA core for sm_80, with PTX, and for sm_90."""
    nvcc = find_nvcc(None)
    problem = why_not(nvcc, None)
    if problem is not None:
        pytest.skip(f"{problem[0]}: {problem[1]}")
    return build_cached(make_cuda_config(nvcc, ARCHS))


@pytest.fixture(scope="module")
def kernels(library: Path) -> list[Kernel]:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump with nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return read_kernels(library, tool)


def test_library_loads_beside_the_cpu_wheel_and_every_op_of_the_cpu_is_there(library: Path) -> None:
    names = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", LOAD, str(library)], env=names, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["before"] == []
    assert re.fullmatch(r"\d+\.\d+", told["info"]["cuda"])
    assert len(told["cpu"]) >= 10
    missing = sorted(set(told["cpu"]) - set(told["cuda"]) - set(CPU_ALONE))
    assert not missing, f"the CPU core registers ops that the CUDA core does not: {', '.join(missing)}"
    # An exception that no longer is one must go.
    assert set(CPU_ALONE) <= set(told["cpu"]) - set(told["cuda"])
    # What has no kernel is composed of PyTorch's and our own, on any device.
    assert set(CPU_ALONE) <= set(told["composite"])
    assert {"pyft::gather_columns", "pyft::gather_planes", "pyft::write_part_"} <= set(told["cuda"])


def test_library_asks_for_no_library_of_cuda(library: Path) -> None:
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert "libtorch_cpu.so" in names
    assert not [name for name in names if "cuda" in name or "cudart" in name]


def test_build_says_nothing_but_what_was_asked(library: Path) -> None:
    log = library.with_name("build.log").read_text()
    assert "warning" not in log.lower().replace("-wall", "")


def test_every_kernel_is_in_both_archs(kernels: list[Kernel]) -> None:
    by_arch = {arch: {kernel.title for kernel in kernels if kernel.arch == arch} for arch in ("80", "90")}
    assert by_arch["80"] == by_arch["90"]
    written = set()
    for path in source_folder().glob("*cuda*"):
        written |= set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", path.read_text()))
    assert by_arch["80"] == written


def test_nothing_is_spilled(kernels: list[Kernel]) -> None:
    spilled = [
        f"{kernel.title} sm_{kernel.arch}: stack {kernel.stack}, local {kernel.local}, {kernel.accesses}"
        for kernel in kernels
        if kernel.stack or kernel.local or kernel.has("LDL") or kernel.has("STL")
    ]
    assert not spilled, "\n".join(spilled)


def test_at_least_two_blocks_of_256_fit_a_multiprocessor(kernels: list[Kernel]) -> None:
    large = [f"{kernel.title} sm_{kernel.arch}: {kernel.registers}" for kernel in kernels if kernel.registers > 128]
    assert not large, "\n".join(large)


def test_memory_is_read_and_written_16_bytes_at_once(kernels: list[Kernel]) -> None:
    narrow = []
    for kernel in kernels:
        if kernel.title in FEW_NUMBERS or (kernel.title == "gather_planes_kernel" and ONE_AT_A_TIME in kernel.name):
            continue
        if kernel.title not in LOADS_BY_PLACE and not kernel.has("LDG.E.128"):
            narrow.append(f"{kernel.name} sm_{kernel.arch} loads {kernel.accesses}")
        stores_few = kernel.title in LOADS_BY_PLACE | STORES_FEW or WRITES_BITS in kernel.name
        if not stores_few and not kernel.has("STG.E.64" if ALL_NARROW.search(kernel.name) else "STG.E.128"):
            narrow.append(f"{kernel.name} sm_{kernel.arch} stores {kernel.accesses}")
    assert not narrow, "\n".join(narrow)


def test_ptx_calls_nothing(library: Path) -> None:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    done = subprocess.run([tool[0], "-ptx", str(library)], env=tool[1], capture_output=True, text=True, check=True)
    assert done.stdout.count(".target sm_80") >= 3
    assert done.stdout.count(".entry") >= 20
    calls = [line.strip() for line in done.stdout.splitlines() if re.match(r"\s*(@%p\d+\s+)?call\b", line)]
    assert not calls, "\n".join(calls[:5])


def test_two_archs_compile_in_minutes(library: Path) -> None:
    """62 to 74 seconds on two idle cores, a minute at most for one arch; here other tests may run beside it."""
    marker = json.loads(library.with_name("complete.json").read_text())
    assert marker["archs"] == list(ARCHS)
    assert marker["seconds"] <= 360.0
