"""What `pyft doctor` prints, and its exit code."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pyft.core import doctor

if sys.version_info >= (3, 11):
    import tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = "import sys\nfrom pyft.core.doctor import doctor\nsys.exit(doctor())"
LOOK = "import sys\nfrom pyft.core.doctor import doctor\nsys.exit(doctor(build=False))"


def rows(text: str) -> dict[str, str]:
    """Label -> text, folded lines joined."""
    found: dict[str, str] = {}
    label = ""
    for line in text.splitlines():
        label = line[:12].strip() or label
        found[label] = f"{found[label]} {line[12:]}" if label in found else line[12:]
    return found


def test_healthy_machine(box: Any) -> None:
    done = box.run(CODE, PYFT_FOO="1")
    assert done.returncode == 0, done.stderr
    told = rows(done.stdout)
    assert list(told) == [
        *("pyft", "python", "torch", "CPU", "GPU", "core", "CUDA core"),
        *("compiler", "ninja", "Python.h", "pybind11", "nvcc", "cache", "variables", "extras", "next"),
    ]
    assert told["torch"].startswith("2.13.0, without CUDA")
    assert "target in use: baseline" in told["CPU"]
    assert told["core"].startswith(f"ready, built now: {box.entry() / '_core.so'}")
    assert told["CUDA core"] == "not used: this torch is built without CUDA"
    assert re.match(r".*\d+\.\d+.* at /", told["compiler"])
    assert re.match(r"\d+\.\d+.* at /", told["ninja"])
    assert re.search(r"MB: 1 built cores, 0 remembered failures", told["cache"])
    assert "PYFT_FOO=1 (not a variable that pyft knows: misspelt?)" in told["variables"]
    for extra in doctor.EXTRAS:
        assert f"{extra}: " in told["extras"]
    assert told["next"]
    unbroken = [line for line in done.stdout.splitlines() if "/" not in line]
    assert max(map(len, unbroken)) <= 100

    again = rows(box.run(CODE).stdout)
    assert again["core"].startswith("ready, in the cache: ")


def test_looking_builds_nothing(box: Any) -> None:
    done = box.run(LOOK, CXX=box.compiler())
    assert done.returncode == 0
    assert rows(done.stdout)["core"] == "not built: it is compiled at first use"
    assert box.calls(" -c ") == 0
    assert not list((box.cache / "core").glob("*/_core.so"))


def test_no_compiler_is_exit_code_1_with_the_mend(box: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = box.run(CODE, PATH=str(tmp_path / "empty"))
    assert done.returncode == 1
    told = rows(done.stdout)
    assert told["core"] == "cannot be used: no C++ compiler on PATH"
    assert told["compiler"] == "missing"
    assert told["next"].startswith("apt-get install g++")


def test_remembered_failure_is_tried_again(box: Any) -> None:
    source = box.folder / "csrc" / "bindings.cpp"
    good = source.read_text()
    source.write_text("int broken( { return 0; }\n")
    assert not box.load()["loaded"]
    done = box.run(LOOK)
    assert done.returncode == 1
    assert rows(done.stdout)["core"].startswith("failed: ")
    assert "1 remembered failures" in rows(done.stdout)["cache"]
    compiler = box.compiler()
    assert box.run(CODE, CXX=compiler).returncode == 1
    assert box.run(CODE, CXX=compiler).returncode == 1
    assert box.calls(" -c ") == 2
    source.write_text(good)
    assert box.run(CODE).returncode == 0


def test_library_that_does_not_load_is_built_again(box: Any) -> None:
    assert box.load()["loaded"]
    library = box.entry() / "_core.so"
    library.write_bytes(b"not a library")
    from pyft.core.cache import mark_complete

    mark_complete(box.entry(), {})
    assert "file too short" in box.load()["warnings"][0]
    done = box.run(CODE)
    assert done.returncode == 0
    assert rows(done.stdout)["core"].startswith("ready, built again now")
    assert box.load()["loaded"]


@pytest.mark.parametrize(("path", "code"), [(None, 0), ("/nowhere", 1)])
def test_off_still_says_whether_it_could_be_built(box: Any, path: str | None, code: int) -> None:
    done = box.run(CODE, PYFT_CORE="off", **({"PATH": path} if path else {}))
    assert done.returncode == code
    expected = "cannot be used: no C++ compiler" if code else "off (PYFT_CORE=off); it can be built here"
    assert rows(done.stdout)["core"].startswith(expected)
    assert "the core is not loaded" in rows(done.stdout)["CPU"]


def test_bad_mode_is_exit_code_1(box: Any) -> None:
    done = box.run(CODE, PYFT_CORE="on")
    assert done.returncode == 1
    assert rows(done.stdout)["core"] == "PYFT_CORE is 'on': expected auto, require or off"
    assert rows(done.stdout)["next"].startswith("unset PYFT_CORE")


def test_extras_are_those_of_the_package() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for name, extra in doctor.EXTRAS.items():
        declared = {re.split(r"[<>=\[]", entry)[0] for entry in project["optional-dependencies"][name]}
        assert declared == {distribution for _, distribution in extra.packages}


def test_status_without_building(box: Any) -> None:
    code = (
        "import json\nfrom pyft.core.loader import core_status\nfound = core_status()\n"
        "print(json.dumps([found.state, str(found.path), found.reason]))"
    )

    def state(**changes: str) -> str:
        return str(json.loads(box.run(code, **changes).stdout)[0])

    assert state() == "not built"
    assert not box.cache.exists()
    assert state(PYFT_CORE="off") == "off"
    box.load()
    assert state() == "ready"
    assert json.loads(box.run(code).stdout)[1:] == [str(box.entry() / "_core.so"), "in the cache"]
    (box.folder / "csrc" / "bindings.cpp").write_text("broken\n")
    box.load()
    assert state() == "failed"
