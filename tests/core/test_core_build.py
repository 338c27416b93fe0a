"""Building the core at first use: once for all processes, not at all for the second, and again after a killed build."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pyft.core.compile import first_error, mend_for, shares_runtime


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_first_use_says_two_lines_and_loads(box: Any) -> None:
    told = box.load()
    assert told["loaded"]
    assert told["same"]
    assert told["answer"] == 42
    assert told["warnings"] == []
    lines = told["said"].splitlines()
    assert len(lines) == 2
    assert lines[0] == f"pyft: compiling the core (once, about half a minute), log: {box.entry() / 'build.log'}"
    assert lines[1].startswith("pyft: core ready in ")
    log = (box.entry() / "build.log").read_text()
    assert "-ffp-contract=off" in log
    assert "-fno-math-errno" in log
    assert "-DTORCH_TARGET_VERSION=0x020d000000000000" in log
    assert not any(flag in log for flag in ("-march", "-ffast-math", "-Ofast"))
    names = {path.name for path in box.entry().iterdir()}
    assert names == {"_core.so", "build.log", "complete.json"}


def test_second_process_runs_no_compiler_and_says_nothing(box: Any) -> None:
    compiler = box.compiler()
    assert box.load(CXX=compiler)["loaded"]
    before = box.calls()
    assert box.calls(" -c ") == 1
    told = box.load(CXX=compiler)
    assert told["loaded"]
    assert told["said"] == ""
    assert box.calls() == before


def test_cache_serves_without_any_tool(box: Any, tmp_path: Path) -> None:
    assert box.load()["loaded"]
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "ninja.py").write_text("raise ImportError('hidden')\n")
    path = f"{tmp_path / 'hidden'}{os.pathsep}{box.site}{os.pathsep}{box.package}"
    assert box.load(PATH="/nowhere", PYTHONPATH=path)["loaded"]


def test_cxx_may_hold_arguments_and_folders_spaces(box: Any, tmp_path: Path, write_sources: Any) -> None:
    sources = write_sources(tmp_path / "a $folder: with 'odd' letters" / "csrc", answer=7)
    cache = tmp_path / "cache & more"
    # Errors are found by an English word, so the compiler must not translate.
    compiler = box.compiler('[ "$LC_ALL" = C ] || exit 9')
    told = box.load(
        CXX=f"env LANGUAGE=de {compiler} -O0", LC_ALL="de_DE.UTF-8", PYFT_CSRC=str(sources), PYFT_CACHE_DIR=str(cache)
    )
    assert told["answer"] == 7
    assert Path(told["path"]).is_relative_to(cache)


def test_eight_processes_at_first_use_compile_once(box: Any) -> None:
    compiler = box.compiler("sleep 0.5")
    code = "from pyft.core.loader import load_core\nprint(load_core().answer)"
    processes = [box.start(code, CXX=compiler) for _ in range(8)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [out.strip() for out, _ in results] == ["42"] * 8
    assert box.calls(" -c ") == 1
    said = "".join(err for _, err in results)
    assert said.count("pyft: compiling the core") == 1
    assert said.count("core ready") == 1


def test_many_threads_load_once(box: Any) -> None:
    code = (
        "import concurrent.futures as f\n"
        "from pyft.core.loader import load_core\n"
        "with f.ThreadPoolExecutor(8) as pool:\n"
        "    found = [pool.submit(load_core) for _ in range(32)]\n"
        "print(len({id(future.result()) for future in found}))"
    )
    done = box.run(code, CXX=box.compiler("sleep 0.2"))
    assert done.stdout.strip() == "1", done.stderr
    assert box.calls(" -c ") == 1


def test_killed_build_does_not_block_the_next(box: Any, tmp_path: Path) -> None:
    release = tmp_path / "release"
    compiler = box.compiler(f'case "$*" in *" -c "*) while [ ! -e {release} ]; do sleep 0.05; done;; esac')
    code = "from pyft.core.loader import load_core\nprint(load_core().answer)"
    first = box.start(code, CXX=compiler)
    try:
        wait_for(lambda: box.calls(" -c ") == 1)
        leftover = list((box.cache / "core").glob("*/build-*"))
        assert len(leftover) == 1
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=10)
        # Its ninja and compiler still run, and the lock must be free all the same.
        second = box.start(code, CXX=compiler)
        wait_for(lambda: box.calls(" -c ") == 2, 10)
    finally:
        release.touch()
    out, err = second.communicate(timeout=60)
    assert out.strip() == "42", err
    assert "waiting" not in err
    assert {path.name for path in box.entry().iterdir()} == {"_core.so", "build.log", "complete.json"}
    first.communicate(timeout=10)


def test_waiting_for_another_process_is_said_and_ends_with_a_message(box: Any, tmp_path: Path) -> None:
    (box.cache / "core").mkdir(parents=True, mode=0o700)
    lock = box.cache / "core" / "build.lock"
    code = (
        "from pyft.core.build_config import make_config\n"
        "from pyft.core.compile import BuildError, build_cached\n"
        "try:\n    build_cached(make_config(), wait=2.5)\n"
        "except BuildError as error:\n    print(error.failure.error, '|', error.failure.mend)"
    )
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = box.run(code)
    assert f"pyft: waiting for another process that is compiling the core (at most 2 s), lock: {lock}" in done.stderr
    assert f"another process has held {lock} for 2 s" in done.stdout
    assert "PYFT_CACHE_DIR" in done.stdout


@pytest.mark.parametrize("harm", ["truncated", "no marker", "damaged marker", "other bytes"])
def test_damaged_entry_is_built_again_and_never_loaded(box: Any, harm: str) -> None:
    assert box.load()["loaded"]
    library, marker = box.entry() / "_core.so", box.entry() / "complete.json"
    good = library.read_bytes()
    if harm == "truncated":
        library.write_bytes(good[: len(good) // 2])
    elif harm == "no marker":
        marker.unlink()
    elif harm == "damaged marker":
        marker.write_text(marker.read_text()[:20])
    else:
        library.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    told = box.load()
    assert told["loaded"]
    assert told["said"].count("is built again: ") == 1
    assert json.loads(marker.read_text())["sha256"]
    assert box.load()["said"] == ""


def test_library_that_is_no_python_module_is_a_named_failure(box: Any) -> None:
    (box.folder / "csrc" / "bindings.cpp").write_text("int nothing() { return 0; }\n")
    told = box.load()
    assert not told["loaded"]
    assert len(told["warnings"]) == 1
    assert "cannot be loaded: dynamic module does not define module export function" in told["warnings"][0]
    assert "run pyft doctor" in told["warnings"][0]


def test_undefined_symbol_is_a_named_failure(box: Any) -> None:
    source = box.folder / "csrc" / "bindings.cpp"
    source.write_text(
        source.read_text()
        .replace("kAnswer)", "missing_symbol())")
        .replace("static PyO", "long missing_symbol();\nstatic PyO", 1)
    )
    told = box.load()
    assert not told["loaded"]
    assert "missing_symbol" in told["warnings"][0]


def test_other_torch_is_another_entry(box: Any, stand_in_torch: Path, write_torch_version: Any) -> None:
    compiler = box.compiler()
    first = box.load(CXX=compiler)["path"]
    try:
        write_torch_version(stand_in_torch, "2.14.1")
        second = box.load(CXX=compiler)["path"]
    finally:
        write_torch_version(stand_in_torch, "2.13.0")
    assert first != second
    assert box.calls(" -c ") == 2
    assert box.load(CXX=compiler)["path"] == first
    assert box.calls(" -c ") == 2


def test_changed_source_or_header_is_another_entry(box: Any) -> None:
    first = box.load()
    header = box.folder / "csrc" / "answer.h"
    header.write_text(header.read_text().replace("42", "43"))
    second = box.load()
    assert (first["answer"], second["answer"]) == (42, 43)
    assert first["path"] != second["path"]


@pytest.mark.parametrize(("flags", "shares"), [([], True), (["-static-libstdc++"], False)])
def test_a_runtime_of_its_own_is_seen(tmp_path: Path, flags: list[str], shares: bool) -> None:
    source = tmp_path / "throws.cpp"
    source.write_text('#include <stdexcept>\nvoid f() { throw std::runtime_error("thrown"); }\n')
    library = tmp_path / "throws.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(source), *flags, "-o", str(library)], check=True)
    assert shares_runtime(library) == shares


def test_source_changed_while_compiling_is_not_kept(box: Any) -> None:
    header = box.folder / "csrc" / "answer.h"
    compiler = box.compiler(f"echo '// later' >> {header}")
    told = box.load(CXX=compiler)
    assert not told["loaded"]
    assert "changed while they were compiled" in told["warnings"][0]
    assert not (box.entry() / "complete.json").exists()
    assert not (box.entry() / "failed.json").exists()


@pytest.mark.parametrize(
    ("log", "error", "mend"),
    [
        (
            "[1/3] g++ -c a.cpp\nFAILED: [code=1] a.o \ng++ -Werror: -c a.cpp\na.cpp:3:1: error: 'x' is wrong\n",
            "a.cpp:3:1: error: 'x' is wrong",
            "read log",
        ),
        ("b.cpp:1:10: fatal error: Python.h: No such file or directory\n", None, "apt-get install python3-dev"),
        ("b.cpp:1:10: fatal error: pybind11/pybind11.h: No such file or directory\n", None, "pip install pybind11"),
        ("g++: error: unrecognized command-line option '-std=c++20'\n", None, "apt-get install g++"),
        ("g++: fatal error: Killed signal terminated program cc1plus\n", None, "MAX_JOBS=1"),
        ("/usr/bin/ld: cannot find -ltorch: No such file or directory\n", None, "reinstall torch"),
        ("cc: fatal error: error writing to /tmp/a.s: No space left on device\n", None, "disk space"),
        ("/usr/bin/ld: a.o: undefined reference to `f'\nninja: build stopped: subcommand failed.\n", None, "read log"),
        ("ninja: error: 'gone.cpp', needed by 'gone.o', missing and no known rule to make it\n", None, "read log"),
    ],
)
def test_first_error_and_mend_of_a_log(log: str, error: str | None, mend: str) -> None:
    expected = error or log.splitlines()[0]
    assert first_error(log) == expected
    assert mend in mend_for(expected, log, Path("log"))


def test_log_without_an_error_gives_none() -> None:
    assert first_error("[1/2] g++ -c 'error: not one'\na.cpp:1: warning: unused\n") is None
