"""Machines where the core cannot be built: the fallback is said once, with the first error and the mend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HIDE_PYTHON_H = (
    "import sysconfig\n"
    "real = sysconfig.get_path\n"
    "def hidden(name, *args, **kwargs):\n"
    "    return '/nowhere' if 'include' in name else real(name, *args, **kwargs)\n"
    "sysconfig.get_path = hidden\n"
)
BROKEN = "int broken( { return 0; }\n"


def load_code() -> str:
    return (
        "import json, warnings\n"
        "from pyft.core.loader import load_core\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    found = [load_core(), load_core()]\n"
        "print(json.dumps([found[0] is None and found[1] is None, [str(w.message) for w in caught]]))"
    )


def test_no_compiler_on_path(box: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    told = box.load(PATH=str(tmp_path / "empty"))
    assert not told["loaded"]
    assert told["kinds"] == ["RuntimeWarning"]
    assert "no C++ compiler on PATH. Mend: apt-get install g++, or conda install gxx" in told["warnings"][0]
    assert told["said"] == ""
    # Once there is one, nothing stands in its way.
    assert box.load()["loaded"]


def test_cxx_that_is_not_there_is_named(box: Any) -> None:
    told = box.load(CXX="/nowhere/g++ -m64")
    assert "CXX names '/nowhere/g++ -m64', which is not on PATH" in told["warnings"][0]


def test_no_ninja(box: Any, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "ninja.py").write_text("raise ImportError('hidden')\n")
    (tmp_path / "bin").mkdir()
    path = f"{tmp_path / 'hidden'}{os.pathsep}{box.site}{os.pathsep}{box.package}"
    told = box.load(PATH=str(tmp_path / "bin"), PYTHONPATH=path, CXX=box.compiler())
    assert not told["loaded"]
    assert "ninja is missing. Mend: pip install ninja" in told["warnings"][0]


def test_ninja_of_the_package_is_found_without_path(box: Any, tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    (tmp_path / "bin").mkdir()
    for name in ("g++", "as", "ld", "sh"):
        (tmp_path / "bin" / name).symlink_to(Path(str(shutil.which(name))).resolve())
    assert box.load(PATH=str(tmp_path / "bin"))["loaded"]


def test_full_disk_is_named_and_not_remembered(box: Any) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs root and a mount namespace")
    box.cache.mkdir()
    script = f"mount -t tmpfs -o size=16k,mode=700 tmpfs {box.cache} && {sys.executable} -c '{load_code()}'"
    script = script.replace("'always'", '"always"')
    command = ["unshare", "-m", "sh", "-c", f"{script}; find {box.cache} -name failed.json"]
    done = subprocess.run(command, env=box.environment(), capture_output=True, text=True)
    none, (warning,) = json.loads(done.stdout.splitlines()[0])
    assert none
    assert "No space left on device" in warning
    assert "Mend: free some disk space" in warning
    assert "failed.json" not in done.stdout


def test_no_python_header(box: Any) -> None:
    done = box.run(HIDE_PYTHON_H + load_code())
    none, warnings = json.loads(done.stdout)
    assert none, done.stderr
    assert len(warnings) == 1
    assert "Python.h is missing. Mend: apt-get install python3-dev" in warnings[0]


def test_python_header_named_by_cpath(box: Any) -> None:
    import sysconfig

    done = box.run(HIDE_PYTHON_H + load_code(), CPATH=sysconfig.get_paths()["include"])
    assert json.loads(done.stdout) == [False, []], done.stderr


def test_all_that_is_missing_is_named_at_once(box: Any, tmp_path: Path) -> None:
    done = box.run(HIDE_PYTHON_H + load_code(), PATH=str(tmp_path))
    _, (warning,) = json.loads(done.stdout)
    assert "no C++ compiler on PATH; Python.h is missing" in warning
    assert "apt-get install g++" in warning
    assert "apt-get install python3-dev" in warning


def test_compile_error_is_named_once_and_remembered(box: Any) -> None:
    (box.folder / "csrc" / "bindings.cpp").write_text(BROKEN)
    compiler = box.compiler()
    told = box.load(CXX=compiler)
    assert not told["loaded"]
    assert len(told["warnings"]) == 1
    log = box.entry() / "build.log"
    assert f"{box.folder / 'csrc' / 'bindings.cpp'}:1:" in told["warnings"][0]
    assert ": error: " in told["warnings"][0]
    assert str(log) in told["warnings"][0]
    assert "core ready" not in told["said"]
    assert ": error: " in log.read_text()
    assert not list(box.entry().glob("build-*"))

    before = box.calls()
    again = box.load(CXX=compiler)
    assert again["warnings"] == told["warnings"]
    assert again["said"] == ""
    assert box.calls() == before


@pytest.mark.parametrize("change", ["compiler", "path", "age", "damaged"])
def test_remembered_failure_is_tried_again_when_the_machine_changed(box: Any, change: str, tmp_path: Path) -> None:
    # A broken compiler, then a mended one: the sources and so the key stay the same.
    compiler = Path(box.compiler("exit 1"))
    assert not box.load(CXX=str(compiler))["loaded"]
    mended = compiler.read_text().replace("\nexit 1\n", "\n")
    status = compiler.stat()
    compiler.write_text(mended + "\n" * (len(compiler.read_text()) - len(mended)))
    os.utime(compiler, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not box.load(CXX=str(compiler))["loaded"], "nothing that can be seen has changed"

    changes = {}
    failed = box.entry() / "failed.json"
    marker = json.loads(failed.read_text())
    if change == "compiler":
        os.utime(compiler)
    elif change == "path":
        changes["PATH"] = f"{os.environ['PATH']}{os.pathsep}{tmp_path}"
    elif change == "age":
        failed.write_text(json.dumps(marker | {"time": time.time() - 2 * 86400}))
    else:
        failed.write_text("{")
    assert box.load(CXX=str(compiler), **changes)["loaded"]
    assert not failed.exists()


def test_require_raises_with_the_same_text_every_time(box: Any, tmp_path: Path) -> None:
    code = (
        "from pyft.core.loader import load_core\nfrom pyft.errors import CoreError\n"
        "texts = []\n"
        "for _ in range(2):\n"
        "    try:\n        load_core()\n"
        "    except CoreError as error:\n        texts.append(str(error))\n"
        "print(len(texts), len(set(texts)), texts[0])"
    )
    done = box.run(code, PATH=str(tmp_path), PYFT_CORE="require")
    assert done.stdout.startswith("2 1 the compiled core cannot be used: no C++ compiler on PATH. Mend: apt-get"), done
    assert "Warning" not in done.stderr


def test_require_loads_where_it_can(box: Any) -> None:
    assert box.load(PYFT_CORE="require")["loaded"]


def test_off_is_silent_and_builds_nothing(box: Any) -> None:
    told = box.load(PYFT_CORE="off", CXX=box.compiler())
    assert not told["loaded"]
    assert told["warnings"] == []
    assert told["said"] == ""
    assert not box.cache.exists()
    assert box.calls() == 0


def test_other_value_is_refused_by_name(box: Any) -> None:
    code = (
        "from pyft.core.loader import load_core\nfrom pyft.errors import ConfigError\n"
        "try:\n    load_core()\nexcept ConfigError as error:\n    print(error)"
    )
    done = box.run(code, PYFT_CORE="on")
    assert done.stdout.strip() == "PYFT_CORE is 'on': expected auto, require or off", done.stderr


def test_warning_as_error_still_leaves_the_reference(box: Any, tmp_path: Path) -> None:
    code = (
        "import warnings\nwarnings.simplefilter('error')\n"
        "from pyft.core.loader import load_core\n"
        "try:\n    load_core()\nexcept RuntimeWarning:\n    print('warned', load_core())"
    )
    assert box.run(code, PATH=str(tmp_path)).stdout.strip() == "warned None"


def test_missing_sources_and_missing_torch_are_named(box: Any, tmp_path: Path) -> None:
    told = box.load(PYFT_CSRC=str(tmp_path / "gone"))
    assert f"no C++ sources in {tmp_path / 'gone'}" in told["warnings"][0]
    code = (
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n" + load_code()
    )
    _, (warning,) = json.loads(box.run(code).stdout)
    assert "torch is not installed" in warning


def test_forked_child_loads_while_a_thread_of_its_parent_does(box: Any, tmp_path: Path) -> None:
    release = tmp_path / "release"
    compiler = box.compiler(f'case "$*" in *" -c "*) while [ ! -e {release} ]; do sleep 0.05; done;; esac')
    code = (
        "import os, threading, time, pathlib\n"
        "from pyft.core import loader\n"
        "thread = threading.Thread(target=loader.load_core)\nthread.start()\n"
        f"calls = pathlib.Path({str(box.calls_file)!r})\n"
        "while not calls.exists() or ' -c ' not in calls.read_text():\n    time.sleep(0.02)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if loader.load_core().answer == 42 else 1)\n"
        f"pathlib.Path({str(release)!r}).touch()\n"
        "thread.join()\n"
        "print(os.waitpid(child, 0)[1], loader.load_core().answer)"
    )
    done = box.run(code, CXX=compiler)
    assert done.stdout.strip() == "0 42", done.stderr
