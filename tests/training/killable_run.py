"""Small runs, each in a process of its own that can be killed at a chosen place. Started by conftest.py.

Reads one request per line (JSON) on stdin, forks, trains in the child, and answers how the child ended. The parent
imports torch but computes nothing with it, so that forking is safe and a run costs no second import.

A request: {"scenario", "directory", "resume": bool, "checkpoint_seconds", "stop": {"at", "count", "how"}}.
`at` is "prepare", "batch", "evaluate", "replace" (before a file is renamed into place) or "replaced" (after);
`count` says which of them; `how` is "INT" or "KILL", or "FSIZE" for a disk that is full from then on.
With {"after": seconds} the parent kills the child from outside.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401  imported before the fork, once for all runs
import torch
import torch._dynamo
from torch import nn

import pyft.core.files
from pyft.core.loader import load_core
from pyft.errors import PyftError
from pyft.samples import Batch
from pyft.training.checkpoint import save_checkpoint
from pyft.training.loop import StageSetup, train
from pyft.training.objectives import class_weights, make_loss
from pyft.training.settings import Settings, resolve
from pyft.training.stages import Stage, make_stages

N, VAL, FEATURES, CLASSES, BATCH = 52, 24, 6, 3, 8


class Net(nn.Module):
    """Body and head with dropout in both, BatchNorm in the body, and a body that stays in eval while it is frozen."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), middle, nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, CLASSES))
        self.body_frozen = False

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        if self.body_frozen:
            self.body.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x)))


class Batches:
    """Batches in an order that depends on the epoch only; the last one is smaller."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, stop: Stop) -> None:
        self.x, self.y, self.stop = x, y, stop
        self.num_batches = -(-len(x) // BATCH)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(BATCH)[start:]:
            self.stop.reached("batch")
            yield Batch(self.x[index], self.y[index], index)


class Stop:
    """Ends this process the way the request asks for."""

    def __init__(self, at: str = "", count: int = 1, how: str = "KILL") -> None:
        self.at, self.left, self.how = at, count, how

    def reached(self, place: str) -> None:
        if place != self.at:
            return
        self.left -= 1
        if self.left == 0 and self.how == "FSIZE":
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
        elif self.left == 0:
            os.kill(os.getpid(), getattr(signal, f"SIG{self.how}"))


SCENARIOS: dict[str, dict[str, Any]] = {
    "adamw": {"settings": {"epochs": 5, "lr": 0.02}, "strategy": "gradual"},
    "sgd": {
        "settings": {"epochs": 4, "lr": 0.05, "optimizer": "sgd", "accumulate": 3, "schedule": "linear", "clip": 0.5},
        "strategy": "gradual",
        "norm": True,
    },
    "plateau": {
        "settings": {"epochs": 12, "lr": 0.4, "schedule": "plateau", "warmup": 2, "patience": 3, "clip": None},
        "strategy": [Stage("head", freeze=True, epochs=3, kind="head"), Stage("full", epochs=9, lr_scale=0.5)],
    },
    "bf16": {
        "settings": {"epochs": 3, "lr": 0.02, "precision": "bf16", "accumulate": 2, "class_weight": "balanced"},
        "strategy": "full",
        "norm": True,
    },
    "body_first": {
        # What the first stage trained is frozen in the second: it must be in the second one's checkpoints.
        "settings": {"epochs": 4, "lr": 0.02, "schedule": "constant"},
        "strategy": [Stage("full", epochs=2), Stage("head", freeze=True, epochs=2, kind="head")],
        "norm": True,
    },
}


def run(request: dict[str, Any]) -> None:
    """Train (or go on training) as the request says, and write what came out."""
    torch.set_num_threads(1)
    scenario = SCENARIOS[request["scenario"]]
    directory = Path(request["directory"])
    stop = Stop(**request.get("stop", {}))
    _watch_renames(stop)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N + VAL, FEATURES, generator=generator)
    y = (x[:, 0] + 0.5 * torch.randn(N + VAL, generator=generator)).mul(2).round().clamp(-1, 1).long() + 1
    torch.manual_seed(11)
    model = Net(scenario.get("norm", False))
    # The child's random state must not matter for a run that is resumed.
    torch.manual_seed(os.getpid())
    settings = resolve(
        Settings(**{"precision": "fp32", "metric": "loss", **scenario["settings"]}), "classification", "array"
    )
    strategy = scenario["strategy"]
    stages = make_stages(strategy, settings.epochs, "head") if isinstance(strategy, str) else strategy
    weights = class_weights(settings.class_weight, y[:N], "classification", CLASSES)

    def evaluate() -> dict[str, float]:
        stop.reached("evaluate")
        with torch.no_grad():
            logits = model(x[N:])
        return {
            "loss": float(nn.functional.cross_entropy(logits, y[N:])),
            "accuracy": float((logits.argmax(1) == y[N:]).float().mean()),
        }

    def prepare(stage: Stage) -> StageSetup:
        stop.reached("prepare")
        model.body_frozen = stage.kind == "head"
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (model.body_frozen and name.startswith("body.")))
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return StageSetup(trainable, Batches(x[:N], y[:N], stop), evaluate=evaluate)

    history = train(
        model,
        stages,
        prepare,
        settings,
        make_loss("classification", settings.loss, weights),
        directory=directory,
        resume_from=directory / "last.pt" if request.get("resume") else None,
        checkpoint_seconds=request.get("checkpoint_seconds", 1e9),
        resume_hint="pyft resume RUN",
    )
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history.rows]
    outcome = {"rows": rows, "best_epoch": history.best_epoch, "stages": [stage["epochs"] for stage in history.stages]}
    (directory / "outcome.json").write_text(json.dumps(outcome))
    save_checkpoint(directory / "final.pt", {"model": model.state_dict()})


def _watch_renames(stop: Stop) -> None:
    replace = os.replace

    def watched(source: str, target: str) -> None:
        stop.reached("replace")
        replace(source, target)
        stop.reached("replaced")

    pyft.core.files.os.replace = watched  # type: ignore[assignment]


def child(request: dict[str, Any]) -> int:
    """The exit code of a run: 0 done, 3 an error of pyft, 130 Ctrl-C; the message goes to "message"."""
    message = Path(request["directory"]) / "message"
    try:
        run(request)
    except KeyboardInterrupt as error:
        message.write_text(str(error))
        return 130
    except PyftError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        message.write_text(f"{type(error).__name__}: {error}")
        return 3
    return 0


def main() -> None:
    """Serve requests until stdin is closed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    load_core()
    for line in sys.stdin:
        request = json.loads(line)
        os.makedirs(request["directory"], exist_ok=True)
        pid = os.fork()
        if pid == 0:
            code = 70
            signal.alarm(60)
            try:
                code = child(request)
            finally:
                sys.stderr.flush()
                os._exit(code)
        if "after" in request:
            time.sleep(request["after"])
            os.kill(pid, signal.SIGKILL)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), flush=True)


if __name__ == "__main__":
    main()
