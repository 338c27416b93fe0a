"""finetune on tables with words and gaps, as their users have them: from the file to predictions by column name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyft
from pyft.errors import ConfigError, DataError

LABEL = "median_house_value"


def tune(model: Any, data: Any, out: Path, **keywords: Any) -> pyft.Result:
    options = {"strategy": "full", "epochs": 4, "lr": 3e-3, "export": None, "progress": False}
    return pyft.finetune(model, data, out=out, **{**options, **keywords})


def mlp(outputs: int = 1, width: int | None = None, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    first = nn.LazyLinear(64) if width is None else nn.Linear(width, 64)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def people(count: int, seed: int = 0, gaps: float = 0.1) -> list[dict[str, Any]]:
    """Rows whose class follows from age and town."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        age, town = round(float(rng.normal(40, 10)), 1), str(rng.choice(["Ulm", "Bonn", "Köln", ""]))
        rich = (age > 40) != (town == "Ulm")
        cell = "" if rng.random() < gaps else age
        noise = round(float(rng.normal()), 3)
        rows.append({"age": cell, "town": town, "noise": noise, "rich": "yes" if rich else "no"})
    return rows


@pytest.fixture(scope="module")
def houses(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """1,500 rows of the census of 1990 to train on and 500 to test, gaps and words as they are."""
    with open(shared_data / "california_housing" / "housing.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))
    folder = tmp_path_factory.mktemp("houses")
    train, test = ([rows[number] for number in part] for part in (order[:1500], order[1500:2000]))
    assert any(not row["total_bedrooms"] for row in train)
    assert any(not row["total_bedrooms"] for row in test)
    return write(folder / "train.csv", train), write(folder / "test.csv", test)


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_california_housing_from_file_to_dollars(houses: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = houses
    data = {"train": train, "test": test}
    result = tune(mlp(), data, tmp_path / "run", label_column=LABEL, epochs=15, export="onnx")
    notes = "\n".join(result.notes)
    with open(train, newline="") as file:
        seen = len({row["ocean_proximity"] for row in csv.DictReader(file)})
    for said in (
        f"'ocean_proximity' ({seen} values); {8 + seen} features",
        "'total_bedrooms' misses",
        "targets scaled",
    ):
        assert said in notes
    assert any(f"--label-column {LABEL}" in command for command in result.next_commands())
    rmse = pipeline_rmse(train, test)
    # Ridge gives about 70,000 dollars, scikit-learn's MLP of the same layers about 65,000.
    assert result.metrics["test_rmse"] < min(rmse["ridge"], 1.05 * rmse["mlp"])
    # The same rows with their columns in another order, one more column, and no label.
    with open(test, newline="") as file:
        rows = list(csv.DictReader(file))
    truth = np.array([float(row[LABEL]) for row in rows])
    shuffled = [{"id": n, **{name: row[name] for name in reversed(row) if name != LABEL}} for n, row in enumerate(rows)]
    other = write(tmp_path / "other.csv", shuffled)
    values = np.array([row["value"] for row in result.predict(other)])
    assert np.sqrt(((values - truth) ** 2).mean()) == pytest.approx(result.metrics["test_rmse"], rel=1e-5)
    from_file = np.array([row["value"] for row in pyft.predict(result.onnx, other)])
    np.testing.assert_allclose(from_file, values, rtol=1e-5)
    assert pyft.evaluate(result.onnx, test, label_column=LABEL)["rmse"] == pytest.approx(result.metrics["test_rmse"])
    one = {name: value if name == "ocean_proximity" else float(value or "nan") for name, value in shuffled[5].items()}
    assert result.predict(one)[0]["value"] == pytest.approx(values[5], rel=1e-5)


def pipeline_rmse(train: Path, test: Path) -> dict[str, float]:
    """Of scikit-learn's own pipeline on the same rows, with Ridge and an MLP of the same layers."""
    pandas = pytest.importorskip("pandas")
    from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import Ridge
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    frames = [pandas.read_csv(path) for path in (train, test)]
    numbers = [name for name in frames[0].columns if name not in (LABEL, "ocean_proximity")]
    features = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
            ("words", OneHotEncoder(handle_unknown="ignore"), ["ocean_proximity"]),
        ]
    )
    found = {}
    for name, model in (
        ("ridge", Ridge()),
        ("mlp", MLPRegressor(hidden_layer_sizes=(64, 32), learning_rate_init=3e-3, batch_size=32, max_iter=15)),
    ):
        peer = make_pipeline(features, TransformedTargetRegressor(model, transformer=StandardScaler()))
        peer.fit(frames[0], frames[0][LABEL])
        found[name] = float(np.sqrt(((peer.predict(frames[1]) - frames[1][LABEL]) ** 2).mean()))
    return found


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[pyft.Result, Path]:
    """A classifier of `people`, and the folder with its data."""
    folder = tmp_path_factory.mktemp("people")
    table = write(folder / "train.csv", people(400))
    result = tune(mlp(2), table, folder / "run", label_column="rich", epochs=20, lr=1e-2, export="onnx")
    return result, folder


def test_classes_and_how_to_look_at_new_rows(tuned: tuple[pyft.Result, Path], capsys: Any) -> None:
    from pyft.cli import main

    result, folder = tuned
    assert result.metrics["val_accuracy"] > 0.85
    assert result.columns == ("age", "town", "noise")
    new = people(60, seed=1)
    swapped = write(folder / "new.csv", [{name: row[name] for name in ("rich", "noise", "town", "age")} for row in new])
    for model in (result, result.onnx):
        assert pyft.evaluate(model, swapped, label_column="rich")["accuracy"] > 0.85
    labels = [row["label"] for row in result.predict(swapped)]
    assert main(["predict", str(result.onnx), str(swapped)]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == labels
    assert main(["eval", str(result.onnx), str(swapped), "--label-column", "rich", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"]["accuracy"] > 0.85
    columns = {name: [row[name] or None for row in new] for name in ("noise", "age", "town")}
    assert [row["label"] for row in result.predict(columns)] == labels
    few = write(folder / "few.csv", [{"age": row["age"], "twon": row["town"], "noise": 0} for row in new])
    with pytest.raises(DataError, match=r"few\.csv: 1 feature column .* is missing: 'town'; nearest: 'twon'"):
        result.predict(few)


def test_a_column_without_any_number_and_words_that_are_new(tuned: tuple[pyft.Result, Path]) -> None:
    result, folder = tuned
    rows = [{"age": "", "town": "Rom", "noise": 1}, {"age": "NA", "town": "Rom", "noise": 2}]
    path = write(folder / "gaps.csv", rows)
    with pytest.warns(UserWarning, match=r"gaps\.csv: 2 of 2 values of 'town' did not occur in training \('Rom'\)"):
        found = result.predict(path)
    median = result.preprocess.number_columns[0].median
    with pytest.warns(UserWarning, match="'Rom'"):
        same = result.predict({"age": [median, median], "town": ["Rom", "Rom"], "noise": [1, 2]})
    for one, other in zip(found, same, strict=True):
        np.testing.assert_array_equal(one["scores"], other["scores"])
    path = write(folder / "bad.csv", [{**rows[0], "age": "old"}])
    with pytest.raises(DataError, match=r"bad\.csv: the column 'age' holds 1 cell without a number, first at line 2"):
        result.predict(path)


def test_a_model_of_another_width(tuned: tuple[pyft.Result, Path], tmp_path: Path) -> None:
    _, folder = tuned
    with pytest.raises(ConfigError) as caught:
        tune(mlp(2, width=3), folder / "train.csv", tmp_path / "run", label_column="rich")
    assert (
        "The table gives F=6 features: 'age', 'noise', 'town=', 'town=Bonn', 'town=Köln', 'town=Ulm'; build the model "
        "for 6 inputs" in str(caught.value)
    )
    assert not (tmp_path / "run").exists()


def test_the_split_does_not_leak_into_the_preprocessing(tuned: tuple[pyft.Result, Path]) -> None:
    from pyft.data.sources import load_data

    result, folder = tuned
    data = load_data(folder / "train.csv", label_column="rich")
    ages = data.train.inputs.columns["age"]  # type: ignore[union-attr]
    assert len(ages) == 320
    column = result.preprocess.number_columns[0]
    assert column.median == np.float32(np.nanmedian(ages))
    filled = np.where(np.isnan(ages), np.nanmedian(ages), ages)
    assert (column.mean, column.std) == (pytest.approx(filled.mean(), rel=1e-6), pytest.approx(filled.std(), rel=1e-6))


def test_numbers_only_where_the_user_asks_for_it(tmp_path: Path) -> None:
    from pyft.cli_arguments import make_parser

    rows = [{"a": n, "b": 1000 + n % 7, "y": "even" if n % 2 else "odd"} for n in range(40)]
    table = write(tmp_path / "t.csv", rows)
    plain = tune(mlp(2), table, tmp_path / "plain", epochs=1)
    assert plain.preprocess.spec() == {"kind": "array"}
    with pytest.raises(DataError, match=r"the column 'b' is empty in 1 row.*preprocess='table'"):
        plain.predict(write(tmp_path / "gap.csv", [{"a": 1, "b": ""}]))
    asked = tune(mlp(2), table, tmp_path / "asked", epochs=1, preprocess="table")
    assert asked.preprocess.feature_names() == ["a", "b"]
    assert asked.predict(write(tmp_path / "gap.csv", [{"a": 1, "b": ""}]))[0]["label"] in ("even", "odd")
    assert asked.predict(np.float32([[1, 1000]]))[0]["label"] in ("even", "odd")
    shell = json.loads((tmp_path / "asked" / "config.json").read_text())["repeat"]["python"]
    assert "preprocess='table'" in shell
    given = make_parser().parse_args(["train", "hf:x", str(table), "--preprocess", "table", "--scale-targets", "false"])
    assert (given.preprocess, given.scale_targets) == ("table", False)
    with pytest.raises(ConfigError, match=r"preprocess: expected 'table', or a function of one sample.*got 'tabel'"):
        tune(mlp(2), table, tmp_path / "other", preprocess="tabel")
    with pytest.raises(DataError, match=r"expected a table of numbers \(N, F\) for preprocess='table'"):
        tune(mlp(2), (np.zeros((40, 2, 2)), [0, 1] * 20), tmp_path / "other", preprocess="table")


def test_options_are_kept_for_a_run_that_is_continued(tmp_path: Path) -> None:
    rows = [{**row, "id": f"x{n}", "plz": f"{n % 3:05}"} for n, row in enumerate(people(60))]
    table = write(tmp_path / "t.csv", rows)
    with pytest.raises(DataError, match=r"the column 'id' holds 48 different words .*leave_out=\['id'\]"):
        tune(mlp(2), table, tmp_path / "run", label_column="rich")

    class Stops(nn.Sequential):
        left = 10**9

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.left -= self.training
            if self.left < 0:
                raise KeyboardInterrupt
            return super().forward(x)

    def run(out: Path, left: int = 10**9) -> pyft.Result:
        model = Stops(*mlp(2))
        model.left = left
        preprocess = pyft.TablePreprocess(words=["plz"], leave_out=["id"])
        return tune(model, table, out, label_column="rich", preprocess=preprocess, batch_size=16)

    whole = run(tmp_path / "whole")
    assert whole.preprocess.feature_names()[-3:] == ["plz=00000", "plz=00001", "plz=00002"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", left=7)
    again = run(tmp_path / "run")
    assert again.metrics == whole.metrics
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]["preprocess"]
    assert stored == {"kind": "table", "words": ["plz"], "leave_out": ["id"], "max_words": 256}
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_features_kept_of_a_frozen_part(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", people(120))
    found = [
        tune(mlp(2, width=6), table, tmp_path / str(kept), label_column="rich", strategy="head", cache_features=kept)
        for kept in ("ram", False)
    ]
    assert found[0].metrics["val_loss"] == pytest.approx(found[1].metrics["val_loss"], rel=1e-5)
    cost = pyft.plan(mlp(2, width=6), table, label_column="rich", strategy="head", scale_targets="auto")
    assert cost.stages[0].kept


def test_a_table_for_a_function_of_rows(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", people(80, gaps=0))

    def length(row: dict[str, Any]) -> torch.Tensor:
        return torch.tensor([row["age"] / 40 - 1, float(row["town"] == "Ulm")])

    result = tune(mlp(2, width=2), table, tmp_path / "run", label_column="rich", preprocess=length, epochs=20, lr=1e-2)
    assert result.metrics["val_accuracy"] > 0.8
