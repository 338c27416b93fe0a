"""One of several processes is told so, before anything is written: not two trainings of the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import pyft
from pyft.errors import ConfigError


def test_finetune_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"one of 2 \(torchrun, WORLD_SIZE\).*with python instead of torchrun"):
        pyft.finetune(nn.Linear(3, 2), (np.zeros((8, 3), np.float32), [0, 1] * 4), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", ["1", "", "many"])
def test_one_process_is_none_of_several(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyft.training.processes import refuse_several_processes

    monkeypatch.setenv("WORLD_SIZE", count)
    refuse_several_processes()


def test_the_command_says_it_in_one_line(tmp_path: Path, shell: Callable[..., Any], environment: Any) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "good\tyes\nbad\tno\n" * 10)
    environment["WORLD_SIZE"] = "2"
    done = shell("train", "hf:none", str(data), cwd=tmp_path)
    assert done.returncode != 0
    assert "one of 2 (torchrun" in done.stderr
    assert "Traceback" not in done.stderr
