"""The emulation of CUDA: each seeded bug is caught in every order, its mended twin passes, and functions are right."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pyft.core.cache import cache_root

FOLDER = Path(__file__).resolve().parent
CSRC = FOLDER.parents[1] / "csrc"
FLAGS = ("-std=c++20", "-O2", "-g1", "-w", "-ffp-contract=off", "-DPYFT_CUDA_EMULATION", f"-I{CSRC}", f"-I{FOLDER}")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
ORDERS = (("ascending",), ("descending",), ("random", "1"), ("random", "2"))
# What the emulation says of each bug.
BUGS = {
    "missing_barrier": "turned is read before anything was written|race: .* of turned",
    "missing_second_barrier": "race: a (write|read) of of_round, unordered with a (read|write)",
    "missing_syncwarp": "turned is read before anything was written|race: .* of turned",
    "shuffle_for_a_fence": "race: a read of turned, unordered with a write",
    "barrier_for_some": r"waits at the barrier seeded_bugs.cu:\d+, but thread \(\d+, 0, 0\) has ended",
    "exit_before_barrier": r"waits at the barrier seeded_bugs.cu:\d+, but thread \(5, 0, 0\) has ended",
    "two_barriers": r"waits at the barrier seeded_bugs.cu:\d+, but thread \(\d+, 0, 0\) waits at the barrier",
    "exit_before_shuffle": r"with mask 0xffffffff, which names lane 4, but thread \(100, 0, 0\) has ended",
    "mask_without_caller": "the mask of a warp function does not name the calling lane",
    "mask_of_absent_lanes": r"names lane 16, but thread \(\d+, 0, 0\) has ended",
    "shuffle_from_outside_its_mask": r"a shuffle reads lane \d+ for lane \d+, but its mask does not name it",
    "misaligned": "an access of 16 bytes is misaligned: its address is 4 modulo 16",
    "unwritten_shared": "of the shared array sums is read before anything was written to it",
    "beyond_shared": "index 128 is outside the shared array sums of 128",
    "race_of_blocks": "race: a (read|write) of global memory, unordered with a write by thread 0 of block",
    "race_of_bytes": "race: a write of global memory, unordered with a write",
    "last_block": "race: a read of global memory, unordered with a write by thread 0 of block",
    "endless_wait": "more than 1048576 accesses: does it wait for a thread that never comes",
    "too_much_shared": "uses 49168 bytes of shared memory; there are 49152",
}
pytestmark = pytest.mark.build


def compiled(name: str, *flags: str) -> Path:
    """The program made of `name`.cu, compiled once for its content."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler here")
    digest = hashlib.sha256("\n".join((*FLAGS, *flags)).encode())
    for path in sorted([*FOLDER.glob("*.h"), FOLDER / f"{name}.cu", *CSRC.glob("*.h")]):
        digest.update(path.read_bytes())
    program = cache_root() / "cuda_emulation" / f"{name}-{digest.hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(exist_ok=True)
        temporary = program.with_suffix(f".{os.getpid()}")
        source = ("-x", "c++", str(FOLDER / f"{name}.cu"))
        done = subprocess.run([compiler, *FLAGS, *flags, *source, "-o", str(temporary)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(temporary, program)
    return program


@pytest.fixture(scope="session")
def bugs() -> Path:
    return compiled("seeded_bugs")


@pytest.fixture(scope="session")
def bugs_sanitized() -> Path:
    return compiled("seeded_bugs", *SANITIZE)


@pytest.fixture(scope="session")
def functions() -> Path:
    return compiled("device_functions")


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught_and_its_mended_twin_passes(bugs: Path, bug: str, order: tuple[str, ...]) -> None:
    broken, mended = run(bugs, bug, "broken", *order), run(bugs, bug, "mended", *order)
    assert broken.returncode == 1
    assert re.search(BUGS[bug], broken.stderr), broken.stderr
    assert f"kernel {bug}, block (" in broken.stderr
    assert re.search(r"thread \(\d+, 0, 0\)", broken.stderr)
    assert (mended.returncode, mended.stderr) == (0, "")


@pytest.mark.parametrize("bug", [*BUGS, "vector_tail"])
def test_mended_twins_pass_under_address_sanitizer(bugs_sanitized: Path, bug: str) -> None:
    for order in ORDERS:
        mended = run(bugs_sanitized, bug, "mended", *order)
        assert (mended.returncode, mended.stderr) == (0, "")


def test_an_overrun_in_the_tail_of_vectors_is_caught(bugs_sanitized: Path) -> None:
    for order in ORDERS:
        broken = run(bugs_sanitized, "vector_tail", "broken", *order)
        assert broken.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in broken.stderr
        assert "seeded_bugs.cu" in broken.stderr


def test_unwritten_shared_memory_is_nan_where_it_is_not_an_error(bugs: Path) -> None:
    without_checks = run(bugs, "unwritten_shared", "broken", "ascending", "0", "unchecked")
    assert without_checks.returncode == 0
    assert without_checks.stdout.replace("-", "").split() == ["nan", "1", "nan", "1"]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_functions_give_what_plain_loops_give(functions: Path, order: tuple[str, ...]) -> None:
    done = run(functions, *order)
    assert done.returncode == 0, done.stderr
    assert "wrong:" not in done.stdout, done.stdout


def order_of_threads(functions: Path, *order: str) -> list[int]:
    line = next(line for line in run(functions, *order).stdout.splitlines() if line.startswith("order "))
    return [int(word) for word in line.split()[1:]]


def test_orders(functions: Path) -> None:
    threads = list(range(96))
    assert order_of_threads(functions, "ascending") == threads
    assert order_of_threads(functions, "descending") == threads[::-1]
    once = order_of_threads(functions, "random", "1")
    assert sorted(once) == threads != once
    assert order_of_threads(functions, "random", "1") == once
    assert order_of_threads(functions, "random", "2") != once


def test_traffic_is_counted(functions: Path) -> None:
    lines = [line.split() for line in run(functions, "ascending").stdout.splitlines() if line.startswith("copy_")]
    found = [(name, *map(int, numbers)) for name, *numbers in lines]
    # 512 vectors of 16 bytes: 256 whole sectors in 16 accesses of warps. 256 floats, one in each sector.
    assert found == [
        ("copy_every_eighth", 256, 1024, 0, 256, 8),
        ("copy_every_eighth", 256, 1024, 0, 256, 8),
        ("copy_in_vectors", 512, 8192, 512, 256, 16),
        ("copy_in_vectors", 512, 8192, 512, 256, 16),
    ]
