"""What the prediction of anything that holds a model rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyft.data.batches import Batches
from pyft.data.sources import load_samples, read_source
from pyft.data.table_preprocess import TablePreprocess
from pyft.data.text import TextPreprocess
from pyft.errors import ConfigError, DataError
from pyft.evaluation.scores import scores_from_logits, to_numpy
from pyft.explain.attribute import METHODS, attribute
from pyft.explain.explanation import Explanation
from pyft.preprocess import table_form
from pyft.samples import Samples
from pyft.subject import Model, Subject, open_subject


def explain(
    model: Model,
    x: Any,
    method: str = "integrated_gradients",
    target: str | int | None = None,
    *,
    task: str = "auto",
    preprocess: Any = None,
    classes: Sequence[str] | None = None,
    baseline: Any = None,
    steps: int | None = None,
    patch: int | None = None,
) -> Explanation:
    """What the prediction for one sample rests on: attributions to its tokens, pixels or features, by captum.

    The output that is explained is the logit of `target`, or the predicted value of a regression. Mode, gradients and
    `requires_grad` of the model and the random state are afterwards as they were.

    Args:
        model: a module, a `Result` or the folder of a run.
        x: one sample: a text; the path of an image or a PIL image; an array or tensor of the shape of a sample; a dict
            from column name to number or word for a model of a table.
        method: "integrated_gradients": parts add up to the output minus that of the baseline; for texts, on the
            embeddings. "input_gradients": how much the output moves per unit of each input; for texts, times the
            embedding, summed. "occlusion": how much the output falls when a token, a feature or a patch of the
            picture becomes the baseline.
        target: label or number of the output; None: the predicted one, for several labels the most probable.
        task, preprocess, classes: as for `pyft.predict`.
        baseline: what stands for "nothing", as the model takes it: a number, or an array of the shape of the sample.
            None: 0, which for images is the mean colour; for texts the padding token in place of every token of the
            text itself, an int being another token.
        steps: of integrated gradients; None: 50, doubled up to 200 until they add up to within 5 %.
        patch: side of the occluded patches, pixels; None: a fourteenth of the shorter side.

    Raises:
        ConfigError: `method`, `target` or `baseline` is not possible, or the model cannot be built again.
        DataError: `x` is not one sample for this model.
        MissingExtraError: captum is not installed: pip install 'pyft[explain]'.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    return explain_subject(open_subject(model, task, preprocess, classes, "torch"), x, method, target,
                           baseline=baseline, steps=steps, patch=patch)  # fmt: skip


def explain_subject(
    subject: Subject,
    x: Any,
    method: str,
    target: str | int | None,
    *,
    baseline: Any = None,
    steps: int | None = None,
    patch: int | None = None,
) -> Explanation:
    """`explain` for a model that is open already."""
    module = subject.module
    assert module is not None
    subject, samples = _one_sample(subject, x)
    inputs = next(iter(Batches(samples, subject.preprocess, 1, shuffle=False).epoch(0))).inputs
    tokens = _tokens(subject, samples, inputs)
    with subject.quiet():
        logits = to_numpy(subject.call(inputs)).reshape(1, -1)
        place, name = _target(subject, target, logits[0])
        found = attribute(
            subject.call, module, inputs, place, method,
            baseline=_baseline(subject, baseline, tokens), keep=tokens.get("keep"), steps=steps, patch=patch,
        )  # fmt: skip
    problem = subject.problem or "classification"
    facts: dict[str, Any] = {
        "method": method, "attributions": found.values, "target": name, "target_index": place,
        "score": float(scores_from_logits(logits.astype(np.float64), problem)[0, place]),
        "output": found.output, "baseline_output": found.baseline_output, "delta": found.delta, "steps": found.steps,
    }  # fmt: skip
    if tokens:
        shown = {key: tokens[key] for key in ("features", "text", "spans")}
        return Explanation(kind="tokens", **facts, **shown)
    assert isinstance(inputs, torch.Tensor)
    return Explanation(**_numbers(subject, samples, inputs), **facts)


# ---------------------------------------------------------------- the sample


def _one_sample(subject: Subject, x: Any) -> tuple[Subject, Samples]:
    raw = _raw(subject, x)
    kind = subject.kind or read_source(raw, None, None, None, labels_required=False).kind
    if kind == "text" and not isinstance(x, str):
        raise DataError(f"x: expected one text, got {type(x).__name__}")
    known = subject.classes if subject.problem != "regression" else None
    samples = load_samples(
        raw, kind=kind, problem="classification", classes=known, labels="ignored",
        columns=table_form(subject.columns, subject.preprocess),
    )  # fmt: skip
    if len(samples) != 1:
        raise DataError(f"x: expected one sample, got {len(samples)}; give one at a time")
    if subject.preprocess is None and (subject.needs_preprocess or kind != "array"):
        raise ConfigError(f"preprocess: {subject.name} keeps none: give the function or object used in training")
    return replace(subject, kind=kind), samples


def _raw(subject: Subject, x: Any) -> Any:
    """A set of one sample, as `pyft.predict` takes it."""
    if isinstance(x, Path) or (isinstance(x, str) and subject.kind == "image"):
        return [Path(x)]
    if isinstance(x, str) or (hasattr(x, "convert") and hasattr(x, "mode")):
        return [x]
    if isinstance(x, Mapping):
        if subject.columns is None:
            raise DataError("x: a dict names columns of a table, but the model was not tuned on one: give an array")
        missing = [name for name in subject.columns if name not in x]
        if missing:
            raise DataError(f"x: there is no {', '.join(map(repr, missing))}; the model takes {len(subject.columns)} "
                            f"columns: {', '.join(subject.columns)}")  # fmt: skip
        return {name: [x[name]] for name in subject.columns}
    if isinstance(x, torch.Tensor):
        return x[None]
    try:
        values = np.asarray(x)
    except ValueError as error:
        raise DataError(f"x: expected one sample, as an array of numbers ({error})") from None
    if values.dtype.kind not in "iufb":
        raise DataError(f"x: expected a text, a picture or numbers, got {type(x).__name__}")
    return values[None]


def _tokens(subject: Subject, samples: Samples, inputs: Any) -> dict[str, Any]:
    """Names of tokens and which are kept in the baseline; {} where the model takes no token numbers."""
    if isinstance(inputs, Mapping):
        numbers = inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values()))
    else:
        numbers = inputs
    if numbers.is_floating_point():
        if isinstance(inputs, Mapping):
            raise DataError(f"x: expected token numbers among the model's inputs, got {', '.join(inputs)}")
        return {}
    if numbers.ndim != 2:
        raise DataError(f"x: expected token numbers (T,), got the shape {tuple(numbers.shape[1:])}")
    if isinstance(subject.preprocess, TextPreprocess):
        text = str(samples.inputs[0])
        words, spans, added = subject.preprocess.tokens(text)
        return {"features": words, "text": text, "spans": spans, "keep": torch.tensor(added)}
    return {"features": [str(number) for number in numbers[0].tolist()], "text": None, "spans": None, "keep": None}


def _baseline(subject: Subject, baseline: Any, tokens: Mapping[str, Any]) -> Any:
    if baseline is None:
        return subject.preprocess.pad_id if tokens and isinstance(subject.preprocess, TextPreprocess) else 0
    try:
        return torch.as_tensor(np.asarray(baseline))
    except (TypeError, ValueError):
        raise ConfigError(f"baseline: expected a number or an array, got {type(baseline).__name__}") from None


def _target(subject: Subject, target: str | int | None, logits: np.ndarray) -> tuple[int, str]:
    """Number and name of the output that is explained."""
    names = subject.classes if subject.problem != "regression" else None
    if target is None:
        place = 0 if subject.problem == "regression" else int(logits.argmax())
    elif isinstance(target, str):
        if names is None or target not in names:
            known = f"one of {', '.join(names[:20])}" if names else "the number of an output, as there are no labels"
            raise ConfigError(f"target={target!r}: expected {known}")
        place = names.index(target)
    else:
        if isinstance(target, bool) or not isinstance(target, int | np.integer) or not 0 <= target < len(logits):
            raise ConfigError(f"target={target!r}: expected a label, or a number from 0 to {len(logits) - 1}")
        place = int(target)
    if names is not None and place < len(names):
        return place, names[place]
    alone = subject.problem == "regression" and len(logits) == 1
    return place, "value" if alone else f"output {place}"


def _numbers(subject: Subject, samples: Samples, inputs: torch.Tensor) -> dict[str, Any]:
    """Kind, names and values of features, or the picture."""
    sample = inputs[0]
    if sample.ndim == 3 and sample.shape[0] in (1, 3):
        return {"kind": "pixels", "picture": _picture(subject, samples, sample)}
    columns: Sequence[str] | None = subject.columns or samples.columns
    if isinstance(subject.preprocess, TablePreprocess):
        columns = subject.preprocess.feature_names()
    if columns is None or len(columns) != sample.numel():
        columns = tuple(_place(place, tuple(sample.shape)) for place in range(sample.numel()))
    return {"kind": "features", "features": list(columns), "values": [float(v) for v in sample.reshape(-1).tolist()]}


def _place(number: int, shape: tuple[int, ...]) -> str:
    """The place of a number in a sample: "3", or "2, 5" in a sequence of features.

    >>> _place(13, (4, 5))
    '2, 3'
    """
    return ", ".join(str(int(place)) for place in np.unravel_index(number, shape))


def _picture(subject: Subject, samples: Samples, sample: torch.Tensor) -> np.ndarray:
    """(H, W, 3) uint8: what the model sees, from the picture itself where the preprocessing tells."""
    pixels = getattr(subject.preprocess, "pixels", None)
    if callable(pixels) and subject.kind == "image":
        return np.ascontiguousarray(pixels(samples.inputs[0]).numpy().transpose(1, 2, 0))
    values = sample.detach().cpu().double().numpy().transpose(1, 2, 0)
    low, high = float(values.min()), float(values.max())
    scaled = ((values - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)
    return np.repeat(scaled, 3, axis=2) if scaled.shape[2] == 1 else scaled
