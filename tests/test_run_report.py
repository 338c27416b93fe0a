"""The report of real runs: written by finetune, in bounded time, and again when asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyft
from pyft.cli import main
from pyft.errors import CheckpointError, ConfigError
from pyft.report.facts import read_run
from pyft.report.page import render

NAMES = ["<script>alert(1)</script>", "plain"]


def frame(count: int, seed: int) -> Any:
    pandas = pytest.importorskip("pandas")
    generator = np.random.default_rng(seed)
    made = pandas.DataFrame(generator.normal(size=(count, 3)), columns=["age", "<img src=x>", "height"])
    made["label"] = np.where(made["age"] + made["height"] > 0, *NAMES)
    return made


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> pyft.Result:
    """A linear model of a table, tuned with a test set of its own."""
    torch.manual_seed(0)
    data = {"train": frame(300, 0), "test": frame(90, 1)}
    out = tmp_path_factory.mktemp("report") / "run"
    return pyft.finetune(nn.Linear(3, 2), data, epochs=3, lr=0.05, export=None, progress=False, out=out)


def test_finetune_writes_it(result: pyft.Result) -> None:
    page = (result.run_dir / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert f"{result.metrics['test_accuracy']:.4f}" in page
    assert page.count("<script>") == 1
    facts = read_run(result.run_dir)
    assert facts.role == facts.held_out["role"] == "test"
    assert facts.held_out["num_samples"] == 90
    assert sum(facts.held_out["calibration"]["count"]) == 90
    assert facts.cost["stages"][-1]["num_trainable"] == 8
    assert facts.cost["memory"]["peak"] >= (facts.cost["memory"]["before"] or 0) > 0
    assert "report.html" in str(result)


def test_the_worst_samples_are_those_of_the_test_set(result: pyft.Result) -> None:
    table = frame(90, 1)
    values = table[["age", "<img src=x>", "height"]].to_numpy(np.float32)
    classes = result.classes or []
    targets = torch.tensor([classes.index(name) for name in table["label"]])
    with torch.no_grad():
        losses = nn.functional.cross_entropy(result.model(torch.tensor(values)).double(), targets, reduction="none")
    worst = read_run(result.run_dir).held_out["worst"]
    assert [one["index"] for one in worst] == losses.argsort(descending=True)[: len(worst)].tolist()
    assert worst[0]["loss"] == pytest.approx(float(losses.max()), rel=1e-5)
    np.testing.assert_allclose(worst[0]["values"], values[worst[0]["index"]], rtol=1e-6)
    assert worst[0]["columns"] == ["age", "<img src=x>", "height"]


def test_again_elsewhere_and_with_other_data(result: pyft.Result, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in result.run_dir.iterdir()}
    path = result.report(tmp_path / "sub" / "page.html")
    assert path == tmp_path / "sub" / "page.html"
    assert path.read_bytes() == before["report.html"]
    other = frame(40, 7)
    page = result.report(tmp_path / "other.html", data=other).read_text()
    assert "test (40 samples)" in page
    assert f"{result.evaluate(other)['accuracy']:.4f}" in page
    assert {path.name: path.read_bytes() for path in result.run_dir.iterdir()} == before
    assert pyft.report(result.run_dir) == result.run_dir / "report.html"


def test_with_explanations(result: pyft.Result, tmp_path: Path) -> None:
    pytest.importorskip("captum", reason="pip install 'pyft[explain]'")
    page = result.report(tmp_path / "page.html", explain=True).read_text(encoding="utf-8")
    assert page.count('class="explanation"') == 6
    assert "<img src=x" not in page
    worst = read_run(result.run_dir).held_out["worst"][0]
    found = result.explain(np.array(worst["values"], np.float32))
    assert f"{found.attributions.reshape(-1)[0]:+.4f}" in page
    with pytest.raises(ConfigError, match="Linear"):
        pyft.report(result.run_dir, explain=True)


def test_what_is_no_run(tmp_path: Path, result: pyft.Result) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        pyft.report(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        pyft.report(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        result.report(tmp_path / "file" / "page.html")


def test_a_damaged_file_is_named(result: pyft.Result, tmp_path: Path) -> None:
    for name in ("config.json", "status.json"):
        (tmp_path / name).write_bytes((result.run_dir / name).read_bytes())
    (tmp_path / "held_out.json").write_text('{"worst": ')
    with pytest.raises(CheckpointError, match=r"held_out\.json"):
        pyft.report(tmp_path)


def test_a_run_without_held_out_samples(tmp_path: Path) -> None:
    made = pyft.finetune(
        nn.Linear(3, 2), frame(60, 0), val=0, epochs=1, export=None, progress=False, out=tmp_path / "r"
    )
    page = (made.run_dir / "report.html").read_text(encoding="utf-8")
    assert "Nothing was held out" in page
    assert not (made.run_dir / "held_out.json").exists()


@pytest.mark.parametrize("problem", ["regression", "multilabel"])
def test_other_problems(problem: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(80, 4)).astype(np.float32)
    y = x @ generator.normal(size=(4, 3)).astype(np.float32)
    targets = y[:, 0] if problem == "regression" else (y > 0).astype(np.int64)
    model = nn.Linear(4, 1 if problem == "regression" else 3)
    made = pyft.finetune(model, (x, targets), task=f"tabular-{problem}", epochs=2, export=None, progress=False,
                         out=tmp_path / "run")  # fmt: skip
    facts = read_run(made.run_dir)
    assert f'id="{ {"regression": "errors", "multilabel": "calibration"}[problem] }"' in render(facts)
    assert len(facts.held_out["points" if problem == "regression" else "label_ece"]) == (
        16 if problem == "regression" else 3
    )


def test_images_are_shown_and_a_lost_one_is_told(colours: Path, tmp_path: Path) -> None:
    from pyft.data.images import ImagePreprocess

    made = pyft.finetune(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), colours,
        preprocess=ImagePreprocess(16), epochs=1, export=None, progress=False, out=tmp_path / "run",
    )  # fmt: skip
    facts = read_run(made.run_dir)
    assert all(one["picture"].startswith("data:image/png;base64,") for one in facts.held_out["worst"])
    assert all(Path(one["path"]).is_file() for one in facts.held_out["worst"])
    assert render(facts).count("<img") == len(facts.held_out["worst"])
    if pytest.importorskip("captum"):
        kept = json.loads((made.run_dir / "held_out.json").read_text())
        kept["worst"][0]["path"] = "/gone.png"
        (made.run_dir / "held_out.json").write_text(json.dumps(kept))
        page = made.report(explain=True).read_text()
        assert "is not in a file any more" in page
        assert page.count('class="explanation"') == 5


def test_a_page_of_many_classes_takes_no_time(result: pyft.Result) -> None:
    facts = read_run(result.run_dir)
    names = [f"class {place}" for place in range(200)]
    facts.config["classes"] = names
    facts.metrics["test"]["confusion"] = np.ones((200, 200), int).tolist()
    facts.metrics["test"]["per_class"] = [
        {"name": name, "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 3} for name in names
    ]
    begin = time.perf_counter()
    page = render(facts)
    # A tenth of that on an idle core; one element for each of the 40,000 cells takes longer.
    assert time.perf_counter() - begin < 2.0
    assert len(page) < 2e6


def test_in_the_shell(result: pyft.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(result.run_dir), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_explain_in_the_shell(
    result: pyft.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("captum", reason="pip install 'pyft[explain]'")
    from pyft import run_explain

    # A module of the user's own cannot be built from its folder.
    whole = run_explain.open_subject
    monkeypatch.setattr(run_explain, "open_subject", lambda _, *rest: whole(result, *rest))
    frame(5, 3).to_csv(tmp_path / "five.csv", index=False)
    words = ["explain", str(result.run_dir), str(tmp_path / "five.csv"), "--method", "input_gradients"]
    assert main([*words, "--row", "4", "--target", "plain", "--html", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("plain: ")
    assert "<img src=x>" in shown
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "<img" not in page
    for row in ("5", "-1"):
        assert main([*words, f"--row={row}"]) == 2
        assert "holds 5 samples" in capsys.readouterr().err
    assert main([*words, "--target", "other"]) == 2
    assert "--target other" in capsys.readouterr().err
