"""The folder of a run: what it holds, who may write to it, and how a run is found again.

config.json        arguments, sources, fingerprints, what "auto" came to, and how to repeat the run
environment.json   versions, processor, threads, commit
status.json        {"state": "started" | "tuned" | "finished"}
plan.txt           the stages, what trains in each
notes.txt          what was said about the data and the model
metrics.csv        one row per epoch
last.pt            the checkpoint from which `resume` continues
start.safetensors  weights before tuning, while a run of a model that cannot be loaded again is not finished
best.safetensors   trained weights of the best epoch
model.safetensors  all weights of the tuned model
metrics.json       final metrics, per class, confusion matrix
preprocess.json    how raw input becomes tensors
target_scale.json  mean and std of the training targets, where the model gives (y - mean) / std
model.onnx         the exported model; parity.json its comparison with PyTorch
timings.json       seconds per part of the story
held_out.json      calibration, and the held-out samples that the model is worst on
cost.json          time and memory of each stage, and what `pyft.plan` had said
report.html        all of this to be read
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import torch

from pyft.core.files import write_json, write_text
from pyft.describe import is_description
from pyft.describe import repeat_commands as repeat_commands
from pyft.errors import CheckpointError, ConfigError
from pyft.samples import Kind, Problem
from pyft.target_scale import TargetScale
from pyft.version import __version__

# Arguments that may differ between a run and its continuation: they do not move a weight.
FREE_ARGUMENTS = ("out", "resume", "progress", "export")
# What a run writes before its first step; a folder that holds nothing else was left by a run that never began.
START_FILES = (
    ".lock", "config.json", "environment.json", "notes.txt", "plan.txt", "preprocess.json", "start.safetensors",
    "target_scale.json",
)  # fmt: skip


def fingerprint_state(module: torch.nn.Module, *, values: bool = True) -> str:
    """SHA-256 over the names, types and shapes of all parameters and buffers, and over their bytes if `values`."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        if values and value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def environment(device: str, processes: int = 1) -> dict[str, Any]:
    """What a reader needs to know to run the same again: versions, processor, threads, commit, command."""
    return {
        "pyft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": _versions(("numpy", "safetensors", "tokenizers", "transformers", "Pillow", "onnx", "onnxruntime")),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "commit": _commit(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _processor_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the folder the run was started in, with "+changes" where files differ from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


# ---------------------------------------------------------------- finding and claiming a run


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that pyft has written a run to."""
    return (Path(path) / "config.json").is_file() and (Path(path) / "status.json").is_file()


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of the run in `path`.

    Raises:
        ConfigError: `path` is not the folder of a run.
        CheckpointError: config.json is damaged.
    """
    folder = Path(path)
    if not is_run(folder):
        raise ConfigError(
            f"{folder} is not the folder of a run: config.json and status.json, which every run has, are not there"
        )
    return _read_json(folder / "config.json")


def stored_arguments(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of the run in `path`, to be given to `finetune` again.

    Raises:
        ConfigError: not a run, or one with arguments that only the caller has: a module, arrays, functions.
    """
    arguments = dict(read_config(path)["arguments"])
    own = [name for name, value in arguments.items() if is_description(value)]
    if own:
        raise ConfigError(
            f"{path}: the run was started with {', '.join(own)} from Python, which no file keeps: "
            f"make the same call again, pyft.finetune(..., out={str(path)!r})"
        )
    return arguments


def read_state(path: str | os.PathLike[str]) -> str:
    """The state of a run: "started", "tuned" (weights and metrics are final, the export is not) or "finished"."""
    return str(_read_json(Path(path) / "status.json")["state"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the run cannot be continued from it") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; the run cannot be continued from it")
    return value


def look_at(out: str | os.PathLike[str], resume: bool | str) -> Path | None:
    """The unfinished run at `out` that is to be continued, or None for a new one. Nothing is written.

    resume "auto" continues an unfinished run and starts a new one where there is none; True asks for an unfinished
    run; False never continues, and never writes over what is there.

    Raises:
        ConfigError: `resume` and what is at `out` do not go together.
    """
    if resume not in (True, False, "auto"):
        raise ConfigError(f"resume: expected True, False or 'auto', got {resume!r}")
    folder = Path(out)
    if folder.name == "auto":
        if resume is True:
            raise ConfigError(f"resume=True needs the folder of the run to continue, got out={str(out)!r}")
        return None
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={str(out)!r} is a file; expected a folder for the run, new or empty")
    if is_run(folder):
        return _continue_or_refuse(folder, resume)
    if folder.is_dir() and not _is_unused(folder):
        raise ConfigError(f"out={str(out)!r} holds files that are not of a run; expected a new or empty folder")
    if resume is True:
        raise ConfigError(f"resume=True, but there is no run in {folder}; leave resume out to start one there")
    return None


def _is_unused(folder: Path) -> bool:
    return all(name in START_FILES or name.endswith(".tmp") for name in os.listdir(folder))


def _continue_or_refuse(folder: Path, resume: bool | str) -> Path:
    if read_state(folder) == "finished":
        raise ConfigError(
            f"out={str(folder)!r} holds a finished run, which is never written over: give another out=, "
            f"or start from its weights with finetune({str(folder)!r}, ...)"
        )
    if resume is False:
        raise ConfigError(
            f"out={str(folder)!r} holds an unfinished run and resume=False: give another out=, "
            "or resume='auto' to continue it"
        )
    return folder


def check_same(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The stored configuration of the run in `folder`, if it is the one now asked for.

    Raises:
        ConfigError: an argument, the data or the model differs; all differences are named.
    """
    stored = read_config(folder)
    before, now = stored["arguments"], config["arguments"]
    differences = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in now
        if key not in (*FREE_ARGUMENTS, "model", "data") and before.get(key) != now.get(key)
    ]
    for subject in ("data", "model"):
        old, new = stored[subject]["fingerprint"], config[subject]["fingerprint"]
        if old != new:
            differences.append(f"the {subject} has fingerprint {new[:12]}, the run was started with {old[:12]}")
    if differences:
        raise ConfigError(
            f"the unfinished run in {folder} was started with something else: {'; '.join(differences)}. "
            "Give the same again to continue it, or another out= to start anew"
        )
    return stored


def create(out: str | os.PathLike[str], task: str) -> RunDir:
    """A new run folder, claimed for this process.

    A last part "auto" becomes <date>-<time>-<task>, made so that two processes never share one.

    Raises:
        ConfigError: the folder cannot be made, or another process writes to it.
    """
    path = Path(out)
    try:
        path = _make_dated(path.parent, task) if path.name == "auto" else path
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out={str(out)!r}: the folder cannot be made ({error.strerror}); give another out="
        ) from None
    run = claim(path)
    if is_run(path):
        run.release()
        raise ConfigError(f"another process has just made a run in {path}; give another out=")
    return run


def _make_dated(parent: Path, task: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 10_000):
        path = parent / (f"{stamp}-{task}" + (f"-{number}" if number > 1 else ""))
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise FileExistsError(17, "ten thousand runs in one second", str(parent))


def claim_unfinished(path: Path) -> RunDir:
    """Take the lock of a run to continue; `ConfigError` where another process has finished it by now."""
    run = claim(path)
    if read_state(path) == "finished":
        run.release()
        raise ConfigError(f"another process has just finished the run in {path}")
    return run


def claim(path: Path) -> RunDir:
    """Take the lock of the run in `path`; the kernel frees it when this process ends, however it ends.

    Raises:
        ConfigError: another process writes to the run.
    """
    lock = filelock.FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(
            f"another process is writing to the run in {path}; wait for it or give another out="
        ) from None
    except OSError as error:
        raise ConfigError(f"out={str(path)!r} cannot be written ({error.strerror}); give another out=") from None
    return RunDir(path, lock)


@dataclass
class RunDir:
    """A run folder claimed by this process.

    Attributes:
        path: the folder.
        first: whether this process writes; of several that train together the others do not.
        seconds: time spent per part of the story, written to timings.json.
    """

    path: Path
    lock: Any
    seconds: dict[str, float] = field(default_factory=dict)
    first: bool = True

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, value: Any) -> Path:
        """Write JSON (*.json) or text, whole or not at all.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        if not self.first:
            return self / name
        try:
            return write_json(self / name, value) if name.endswith(".json") else write_text(self / name, value)
        except OSError as error:
            raise CheckpointError(
                f"{self / name} cannot be written ({error.strerror}): make room or give another out="
            ) from None

    def set_state(self, state: str) -> None:
        """Write status.json: "started", "tuned" or "finished"."""
        self.write("status.json", {"state": state})

    def release(self) -> None:
        """Let other processes write to the run."""
        if self.first:
            self.lock.release()

    def discard(self) -> None:
        """Remove a folder that holds nothing worth keeping."""
        import shutil

        if not self.first:
            return
        self.lock.release()
        shutil.rmtree(self.path, ignore_errors=True)


# ---------------------------------------------------------------- reading a run


@dataclass
class OpenRun:
    """The tuned model of a run, ready to be used.

    Attributes:
        path: the folder.
        module: the model with its tuned weights, in eval mode, on the CPU.
        preprocess: turns a raw sample into tensors; None where it was a function of the user's, which no file keeps.
        classes, problem, kind: as in `Data`.
        config: config.json.
        target_scale: the unit of a regression model's outputs; None: that of the targets.
    """

    path: Path
    module: torch.nn.Module
    preprocess: Any
    classes: list[str] | None
    problem: Problem
    kind: Kind
    config: dict[str, Any]
    target_scale: TargetScale | None = None


def open_run(path: str | os.PathLike[str], model: torch.nn.Module | None = None) -> OpenRun:
    """Build the model of a run again, with its tuned weights.

    Args:
        path: the folder of a run.
        model: a module of the same architecture, which gets the weights in place; needed for a run of a module of
            the user's own, which pyft cannot build.

    Raises:
        ConfigError: not a run, or a run whose model cannot be built without `model`.
        CheckpointError: the weights are not there yet, damaged, or of another architecture.
    """
    from pyft.models.saved import load_state

    folder = Path(path)
    config = read_config(folder)
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: the run is not finished, there are no tuned weights: pyft resume {folder}")
    module = model if model is not None else _build(config, folder)
    load_state(folder / "model.safetensors", module)
    kind, problem = config["data"]["kind"], config["data"]["problem"]
    preprocess, scale = read_preprocess(folder), read_target_scale(folder)
    return OpenRun(folder, module.eval(), preprocess, config["classes"], problem, kind, config, scale)


def read_preprocess(path: str | os.PathLike[str]) -> Any:
    """The preprocessing of the run in `path`; None where it was a function of the user's."""
    from pyft.preprocess import preprocess_of

    return preprocess_of(_read_json(Path(path) / "preprocess.json"))


def read_target_scale(path: str | os.PathLike[str]) -> TargetScale | None:
    """target_scale.json of the run in `path`; None where its targets were not scaled.

    Raises:
        CheckpointError: it is damaged.
    """
    file = Path(path) / "target_scale.json"
    return TargetScale.from_dict(_read_json(file)) if file.is_file() else None


def read_metrics(path: str | os.PathLike[str]) -> dict[str, float]:
    """The final metrics of the run in `path` as `Result.metrics` has them; NaN where one was not finite."""
    written = _read_json(Path(path) / "metrics.json")
    return {
        f"{role}_{name}": float("nan") if value is None else float(value)
        for role, found in written.items()
        if isinstance(found, dict)
        for name, value in found["values"].items()
    }


def can_build(path: str | os.PathLike[str]) -> bool:
    """Whether `open_run` needs no `model` for the run in `path`."""
    model = read_config(path)["model"]
    return model["spec"] is not None or str(model["source"]).startswith("hf:")


def _build(config: Mapping[str, Any], folder: Path) -> torch.nn.Module:
    from pyft.models.head import fit_head
    from pyft.models.load import load_model
    from pyft.models.text import TextClassifier

    model = config["model"]
    if model["spec"] is not None:
        return TextClassifier.from_spec(model["spec"])
    if not str(model["source"]).startswith("hf:"):
        raise ConfigError(
            f"{folder} holds the weights of {model['class']}, a module of your own, which pyft cannot build: "
            f"build it, with {model['num_outputs']} outputs, and give open_run({str(folder)!r}, model)"
            + (f"; {folder / 'model.onnx'} runs without it" if (folder / "model.onnx").is_file() else "")
        )
    module = load_model(model["source"]).module
    if model["head"]["name"] is not None:
        fit_head(module, model["num_outputs"], head=model["head"]["name"])
    return module
