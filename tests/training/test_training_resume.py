"""A run that is stopped anywhere and resumed ends with the bits of one that was not."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pyft.training.checkpoint import load_checkpoint, read_weights

Run = Callable[..., int]

# Batches of the first stage, 7 an epoch.
FIRST_STAGE = {"adamw": 7, "sgd": 7, "plateau": 21, "bf16": 21, "body_first": 14}


@pytest.fixture(scope="session")
def uninterrupted(killable_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an uninterrupted run of a scenario."""
    done: dict[str, Path] = {}

    def folder(scenario: str) -> Path:
        if scenario not in done:
            directory = tmp_path_factory.mktemp(f"whole_{scenario}")
            assert killable_run(scenario=scenario, directory=directory) == 0
            done[scenario] = directory
        return done[scenario]

    return folder


def metrics(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same_bits(one: Any, other: Any, place: str = "") -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, place
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            if key != "seconds":
                assert_same_bits(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(left, right, f"{place}/{number}")
    else:
        assert one == other or (one != one and other != other), place


def assert_same_run(directory: Path, whole: Path) -> None:
    assert_same_bits(load_checkpoint(directory / "final.pt"), load_checkpoint(whole / "final.pt"))
    assert_same_bits(load_checkpoint(directory / "last.pt"), load_checkpoint(whole / "last.pt"))
    assert_same_bits(read_weights(directory / "best.safetensors"), read_weights(whole / "best.safetensors"))
    assert metrics(directory) == metrics(whole)
    assert (directory / "outcome.json").read_text() == (whole / "outcome.json").read_text()
    assert not list(directory.glob(".*.tmp")) or (directory / "killed").exists()


def test_scenarios_do_what_they_are_for(uninterrupted: Callable[[str], Path]) -> None:
    """Otherwise the comparisons below would compare less than they seem to."""
    plateau = json.loads((uninterrupted("plateau") / "outcome.json").read_text())
    assert plateau["stages"][1] < 9, "early stopping must end the second stage"
    lrs = [row["lr"] for row in plateau["rows"] if row["stage"] == "full"]
    assert any(after < before for before, after in pairwise(lrs)), "the plateau must lower lr"
    border = json.loads((uninterrupted("body_first") / "outcome.json").read_text())
    assert border["stages"] == [2, 2]


@pytest.mark.parametrize("scenario", ["adamw", "sgd", "plateau", "bf16", "body_first"])
@pytest.mark.parametrize("how", ["INT", "KILL"])
def test_stop_inside_an_epoch(
    scenario: str, how: str, killable_run: Run, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Stopped in the first stage and again in the second; SIGKILL falls back to the last checkpoint of a step."""
    steps = {"checkpoint_seconds": 0.0 if how == "KILL" else 1e9}
    ended = 130 if how == "INT" else -signal.SIGKILL
    first = {"at": "batch", "count": 5, "how": how}
    assert killable_run(scenario=scenario, directory=tmp_path, stop=first, **steps) == ended
    position = load_checkpoint(tmp_path / "last.pt")["position"]
    assert position["batch"] > 0
    second = {"at": "batch", "count": min(FIRST_STAGE[scenario], 11), "how": how}
    assert killable_run(scenario=scenario, directory=tmp_path, resume=True, stop=second, **steps) == ended
    assert load_checkpoint(tmp_path / "last.pt")["position"]["step"] > position["step"]
    assert killable_run(scenario=scenario, directory=tmp_path, resume=True) == 0
    assert_same_run(tmp_path, uninterrupted(scenario))


@pytest.mark.parametrize("scenario", ["adamw", "sgd", "plateau", "body_first"])
@pytest.mark.parametrize("how", ["INT", "KILL"])
@pytest.mark.parametrize("place", ["last batch of stage 1", "evaluation", "prepare of stage 2"])
def test_stop_at_the_border_of_stages(
    scenario: str, how: str, place: str, killable_run: Run, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    batches = FIRST_STAGE[scenario]
    stop = {
        "last batch of stage 1": {"at": "batch", "count": batches},
        "evaluation": {"at": "evaluate", "count": batches // 7},
        "prepare of stage 2": {"at": "prepare", "count": 2},
    }[place]
    ended = 130 if how == "INT" else -signal.SIGKILL
    assert killable_run(scenario=scenario, directory=tmp_path, stop={**stop, "how": how}) == ended
    if how == "INT" and place == "evaluation":
        # The epoch is done; only its evaluation has to be repeated.
        assert load_checkpoint(tmp_path / "last.pt")["position"]["batch"] == 7
    assert killable_run(scenario=scenario, directory=tmp_path, resume=True) == 0
    assert_same_run(tmp_path, uninterrupted(scenario))


@pytest.mark.parametrize("moment", ["replace", "replaced"])
def test_kill_around_every_file_that_is_written(
    moment: str, killable_run: Run, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Between two renames nothing on disk changes, so these are all the states that a kill can leave."""
    whole = uninterrupted("body_first")
    for count in range(1, 40):
        directory = tmp_path / str(count)
        stop = {"at": moment, "count": count, "how": "KILL"}
        status = killable_run(scenario="body_first", directory=directory, stop=stop)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        (directory / "killed").touch()
        resume = (directory / "last.pt").exists()
        assert resume or count == 1
        assert killable_run(scenario="body_first", directory=directory, resume=resume) == 0
        assert_same_run(directory, whole)
    assert 8 < count < 39


def test_kill_from_outside_at_any_time(killable_run: Run, uninterrupted: Callable[[str], Path], tmp_path: Path) -> None:
    for delay in (0.02, 0.05, 0.08, 0.12):
        status = killable_run(
            scenario="adamw",
            directory=tmp_path,
            resume=(tmp_path / "last.pt").exists(),
            checkpoint_seconds=0.0,
            after=delay,
        )
        assert status in (0, -signal.SIGKILL)
    (tmp_path / "killed").touch()
    assert killable_run(scenario="adamw", directory=tmp_path, resume=(tmp_path / "last.pt").exists()) == 0
    assert_same_run(tmp_path, uninterrupted("adamw"))


def test_ctrl_c_says_how_to_go_on(killable_run: Run, tmp_path: Path) -> None:
    stop = {"at": "batch", "count": 10, "how": "INT"}
    assert killable_run(scenario="adamw", directory=tmp_path, stop=stop) == 130
    message = (tmp_path / "message").read_text()
    assert "stage 'full', epoch 2, step 11" in message
    assert "pyft resume RUN" in message
    # The step in progress was finished before the checkpoint.
    assert load_checkpoint(tmp_path / "last.pt")["position"]["step"] == 10


def test_a_finished_run_resumes_to_itself(
    killable_run: Run, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    assert killable_run(scenario="sgd", directory=tmp_path) == 0
    (tmp_path / "final.pt").unlink()
    stop = {"at": "batch", "count": 1, "how": "KILL"}
    assert killable_run(scenario="sgd", directory=tmp_path, resume=True, stop=stop) == 0
    assert_same_run(tmp_path, uninterrupted("sgd"))


def test_full_disk_keeps_the_last_good_checkpoint(
    killable_run: Run, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    stop = {"at": "batch", "count": 12, "how": "FSIZE"}
    assert killable_run(scenario="adamw", directory=tmp_path, stop=stop, checkpoint_seconds=0.0) == 3
    message = (tmp_path / "message").read_text()
    assert message.startswith("CheckpointError: ")
    assert "last good one is kept" in message
    assert load_checkpoint(tmp_path / "last.pt")["position"]["step"] == 11
    assert not list(tmp_path.glob(".*.tmp"))
    assert killable_run(scenario="adamw", directory=tmp_path, resume=True) == 0
    assert_same_run(tmp_path, uninterrupted("adamw"))
