"""The report of a run, written when it is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pyft.core.files import write_text
from pyft.data.batches import Batches
from pyft.data.checks import check_samples
from pyft.errors import ConfigError, DataError, need
from pyft.evaluation.held_out import HeldOut
from pyft.evaluation.predict import evaluate_batches
from pyft.explain.explanation import Explanation, together
from pyft.job import EVALUATION_BATCH
from pyft.record import held_out_facts
from pyft.report.facts import RunFacts, read_run
from pyft.report.markup import Html, element, foreign, join
from pyft.report.page import render
from pyft.result import Result
from pyft.run_dir import is_run
from pyft.run_explain import explain_subject
from pyft.subject import Subject, check_width, labelled, open_subject

EXPLAINED = 6
"""So many of the worst samples are explained."""
STEPS = 50


def report(
    model_or_run: Result | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    explain: bool = False,
    data: Any = None,
) -> Path:
    """Write the report of a run as one HTML page that needs no network and no other file.

    It tells what was tuned and how to repeat it, how it learned, the metrics, confusion matrix and calibration, shows
    the samples that the model is worst on, and how the exported file compares. `finetune` writes one at its end.

    Args:
        model_or_run: a `Result`, or the folder of a run.
        path: of the page; None: report.html in the folder of the run.
        explain: attribute the predictions for six of the worst samples to their tokens, pixels or features.
        data: one labelled set, as `finetune` takes it, which takes the place of the held-out samples: one pass over
            the model. None: what the run has kept of its own.

    Returns:
        The path of the page.

    Raises:
        ConfigError: not a run; with `explain`, one whose model cannot be built again; or `path` cannot be written.
        CheckpointError: a file of the run is damaged.
        DataError: `data` cannot be used.
        MissingExtraError: `explain`, and captum is not installed: pip install 'pyft[explain]'.
    """
    folder = model_or_run.run_dir if isinstance(model_or_run, Result) else Path(model_or_run)
    if not is_run(folder):
        what = "is not the folder of a run" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}; expected a Result or the folder of a run")
    if explain:
        need("captum.attr", "explain", "report(explain=True)")
    facts = read_run(folder)
    if data is not None:
        _measure(facts, open_subject(model_or_run, "auto", None, None, "auto"), data)
    explanations: list[Html] = []
    notes: list[str] = []
    if explain:
        explanations, notes = _explained(facts, open_subject(model_or_run, "auto", None, None, "torch"))
    target = folder / "report.html" if path is None else Path(path)
    try:
        return write_text(target, render(facts, explanations, notes))
    except OSError as error:
        raise ConfigError(f"path={str(target)!r}: the report cannot be written ({error.strerror})") from None


def _measure(facts: RunFacts, subject: Subject, data: Any) -> None:
    """Put metrics and samples of `data` in the place of those of the run."""
    subject, samples = labelled(subject, data, None, None)
    check_samples(samples, samples.name)
    batches = Batches(samples, subject.preprocess, EVALUATION_BATCH, shuffle=False)
    problem = subject.problem or "classification"
    kept = HeldOut(problem, subject.classes)
    with subject.quiet():
        check_width(subject, samples, batches)
        metrics = evaluate_batches(subject.call, batches.epoch(0), problem, subject.classes, kept.update)
    facts.metrics["test"] = metrics.to_dict()
    facts.held_out = held_out_facts(kept, samples, "test")


def _explained(facts: RunFacts, subject: Subject) -> tuple[list[Html], list[str]]:
    """Explanations of the worst samples, and why some are not there."""
    found: list[tuple[Any, Explanation]] = []
    notes: list[str] = []
    for one in (facts.held_out.get("worst") or [])[:EXPLAINED]:
        try:
            x = _sample(one)
            explanation = explain_subject(subject, x, "integrated_gradients", None, steps=STEPS)
        except DataError as error:
            notes.append(f"sample {one.get('index')}: {error}")
            continue
        what = join([f"sample {one.get('index')}, true: ", foreign(one.get("true")), ", predicted:"])
        found.append((element("p", what, class_="where"), explanation))
    if not found and not notes:
        notes.append("The run has kept no held-out samples that could be explained.")
    return together(found), notes


def _sample(one: dict[str, Any]) -> Any:
    """A kept sample as `explain` takes it.

    Raises:
        DataError: what was kept is not enough.
    """
    if "text" in one:
        return str(one["text"])
    if one.get("values") is not None and any(isinstance(value, str) for value in one["values"]):
        return dict(zip(one["columns"], one["values"], strict=True))
    if one.get("values") is not None:
        if any(value is None for value in one["values"]):
            raise DataError("it has numbers that are not finite")
        return np.array(one["values"]).reshape(one["shape"]).astype(_numbers(one["values"]))
    if one.get("path") and Path(one["path"]).is_file():
        return Path(one["path"])
    raise DataError("it is not in a file any more, so it cannot be explained afterwards; give it to pyft.explain")


def _numbers(values: list[Any]) -> type:
    return np.int64 if all(isinstance(value, int) for value in values) else np.float32
