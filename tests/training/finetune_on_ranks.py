"""What the processes of test_training_processes.py run, in a module of its own for them to find."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

import pyft
import pyft.core.files
from pyft.core.loader import load_core

WORLD = 3
SAMPLES, VALIDATION, FEATURES, CLASSES = 66, 23, 6, 3


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def arrays(problem: str = "classification") -> tuple[np.ndarray, np.ndarray]:
    """66 training and 23 validation samples: batches of 8 leave two, fewer than there are processes."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(SAMPLES + VALIDATION, FEATURES)).astype(np.float32)
    scores = x @ generator.normal(size=(FEATURES, CLASSES))
    return x, scores[:, :1].astype(np.float32) if problem == "regression" else scores.argmax(1)


class Counted(nn.Linear):
    """A layer that counts the samples whose features are computed to be stored."""

    samples = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            self.samples += len(x)
        return super().forward(x)


class Net(nn.Module):
    """Body and head, and a layer that nothing uses. It does something at a certain step.

    Args:
        at: the training pass, from 1, in which `act(outputs)` is called.
    """

    def __init__(self, outputs: int = CLASSES, norm: bool = False, at: int = 0, act: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16) if norm else nn.Tanh(), nn.Tanh())
        self.spare = nn.Linear(4, 4)
        self.head = nn.Linear(16, outputs)
        self.at, self.act, self.passes = at, act, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.body(x))
        if self.training and torch.is_grad_enabled() and out.requires_grad:
            self.passes += 1
            if self.passes == self.at:
                out = self.act(out)
        return out


def tune(out: Path, net: Any = None, data: Any = None, **options: Any) -> pyft.Result:
    """A short run on arrays. The weights of the processes differ at first: those of the first count."""
    torch.manual_seed(rank())
    words = {"strategy": "full", "epochs": 3, "batch_size": 8, "lr": 0.02, "val": VALIDATION, "precision": "fp32"}
    words |= {"progress": False, "export": None, "head": None, "device": "cpu", **options}
    return pyft.finetune(Net() if net is None else net, arrays() if data is None else data, out=out, **words)


def facts(result: pyft.Result) -> dict[str, Any]:
    """What must be the same in all processes, and as in one."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]
    return {
        "metrics": result.metrics,
        "rows": rows,
        "confusion": None if result.confusion is None else result.confusion.tolist(),
        "weights": {name: value.detach().clone() for name, value in result.model.state_dict().items()},
        "run": result.run_dir,
        "onnx": result.onnx,
        "notes": result.notes,
    }


CASES: dict[str, dict[str, Any]] = {
    "weighted": {"class_weight": "balanced", "clip": 0.05, "label_smoothing": 0.1, "export": "onnx"},
    "accumulated": {"accumulate": 3, "optimizer": "sgd", "class_weight": [1.0, 0.0, 2.0]},
    "stopped": {"epochs": 12, "patience": 2, "schedule": "plateau", "lr": 0.3, "metric": "loss"},
    "gradual": {"strategy": "gradual", "head": "head"},
    "rows": {"freeze": {"body.0": pyft.Rows(0.5), "head": False}},
    "no validation": {"val": 0, "batch_size": 16},
}


def case(name: str, folder: Path) -> dict[str, Any]:
    return facts(tune(folder / name, **CASES[name]))


def regression(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    return facts(tune(folder / "regression", Net(1), arrays("regression"), loss="huber", scale_targets=True))


def normed(folder: Path) -> dict[str, Any]:
    """BatchNorm and last batches of two, which no process may cut."""
    return facts(tune(folder / "normed", Net(norm=True)))


def cached(folder: Path, cache: str) -> tuple[int, int, dict[str, Any]]:
    """The head on stored features: samples that this process computed, samples stored."""
    load_core()  # from the cache that it is in
    before = os.environ.get("PYFT_CACHE_DIR")
    os.environ["PYFT_CACHE_DIR"] = str(folder)
    torch.manual_seed(0)
    net = Net()
    net.body[0].__class__ = Counted
    try:
        result = tune(folder / "run", net, strategy="head", head="head", cache_features=cache)
    finally:
        del os.environ["PYFT_CACHE_DIR"]
        if before is not None:
            os.environ["PYFT_CACHE_DIR"] = before
    return net.body[0].samples, len(list(folder.glob("features/*/manifest.json"))), facts(result)


def texts(folder: Path, encoder: str) -> dict[str, Any]:
    """Padded texts of many lengths, first on stored features, then whole."""
    words = ["cash bank", "soup eat", "ball team"]
    lines = [f"{' '.join(['i', 'want', 'to', 'a'][: n % 5])} {words[n % 3].split()[n % 2]}" for n in range(50)]
    table = [(line.strip(), f"label{n % 3}") for n, line in enumerate(lines)]
    path = folder / f"{rank()}.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in table))
    words_of = {"epochs": 3, "batch_size": 8, "val": 0.3, "export": None, "progress": False, "precision": "fp32"}
    return facts(pyft.finetune(f"hf:{encoder}", str(path), out=folder / "texts", lr=0.01, **words_of))


def raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _nan(out: Tensor) -> Tensor:
    return out * float("nan") if rank() == 1 else out


def _raise(out: Tensor) -> Tensor:
    if rank() == 1:
        raise ValueError("no such day")
    return out


def _raise_in_backward(out: Tensor) -> Tensor:
    def fail(gradient: Tensor) -> None:
        raise ValueError("no way back")

    if rank() == 1:
        out.register_hook(fail)
    return out


def _fill_disk(out: Tensor) -> Tensor:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # The store by which processes meet is a file here, so that the disk must not be full for all.
    if rank() == 0:
        pyft.core.files.os.replace = refuse  # type: ignore[assignment]
    return out


def _interrupt(out: Tensor) -> Tensor:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return out


def _kill(out: Tensor) -> Tensor:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return out


ACTIONS = {
    "nan": _nan, "raise": _raise, "raise in backward": _raise_in_backward, "disk": _fill_disk, "interrupt": _interrupt,
    "kill": _kill,
}  # fmt: skip


def at_step(folder: Path, action: str, at: int = 14) -> tuple[str, bool]:
    """What was raised, and whether there is a checkpoint; at the 14th step, in the second epoch."""
    out = folder / "run"
    replace = os.replace
    try:
        said = raised(lambda: tune(out, Net(at=at, act=ACTIONS[action])))
    finally:
        os.replace = replace
    return said, (out / "last.pt").exists()


def interrupted_evaluation(folder: Path) -> str:
    """Ctrl-C reaches one process while the model is scored."""

    class Scored(Net):
        def eval(self) -> Net:
            if self.passes and rank() == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return super().eval()

    return raised(lambda: tune(folder / "run", Scored()))


def tuned(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    return facts(tune(folder / "run", **options))


def whole(folder: Path) -> dict[str, Any]:
    return facts(tune(folder / "run"))


class Refused:
    """Calls that no process may begin."""

    @staticmethod
    def other_data(folder: Path) -> None:
        x, y = arrays()
        tune(folder / "run", data=(x + rank(), y))

    @staticmethod
    def other_model(folder: Path) -> None:
        tune(folder / "run", nn.Linear(FEATURES, CLASSES) if rank() == 2 else Net())

    @staticmethod
    def other_arguments(folder: Path) -> None:
        tune(folder / "run", lr=0.1 if rank() else 0.2, seed=0)

    @staticmethod
    def small_batches(folder: Path) -> None:
        tune(folder / "run", batch_size=2)

    @staticmethod
    def one_bad_argument(folder: Path) -> None:
        tune(folder / "run", schedule="cosine" if rank() < 2 else "moon")

    @staticmethod
    def used_folder(folder: Path) -> None:
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run" / "mine.txt").write_text("mine")
        distributed.barrier()
        tune(folder / "run")


def refused(action: str, folder: Path) -> tuple[str, list[str]]:
    said = raised(lambda: getattr(Refused, action)(folder))
    distributed.barrier()
    return said, sorted(os.listdir(folder))
