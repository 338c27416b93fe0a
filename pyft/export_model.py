"""`pyft.export_onnx`: a module, a result or the folder of a run as an ONNX file that is proven to behave the same."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pyft.data.batches import Batches
from pyft.data.sources import load_data, load_samples
from pyft.describe import is_description
from pyft.errors import ConfigError, DataError, need
from pyft.export.front import FORMS, Form
from pyft.export.onnx import export_module
from pyft.export.parity import Parity
from pyft.export.run import CPU
from pyft.models.call import probing
from pyft.preprocess import spec_of, table_form
from pyft.proof import lower, prove
from pyft.result import Result
from pyft.run_dir import fingerprint_state, read_config, read_metrics, read_target_scale
from pyft.samples import Batch, Kind, Samples
from pyft.subject import labelled, open_subject
from pyft.target_scale import TargetScale

EXAMPLE_SIZE = 4
PRECISIONS = ("fp32", "fp16", "int8")

# Where a run's texts are gone, these of different lengths show whether the file behaves like the model.
TEXTS = [
    "ok",
    "Where is my order?",
    "The second parcel came this morning, but the invoice in it is for somebody else.",
    "Please call me back after four, I would like to talk about the offer you sent last week, and about the "
    "two machines that are still waiting to be repaired.",
]
PICTURE_SIZES = ((97, 131), (300, 200), (33, 33))
"""(height, width) of the pictures of noise that stand for the data where there is none."""


def export_onnx(
    model: nn.Module | Result | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    data: Any = None,
    example: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    inputs: Form | Literal["auto"] = "auto",
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    opset: int | None = None,
    max_drop: float = 0.01,
    classes: Sequence[str] | None = None,
    task: str | None = None,
    kind: Kind | None = None,
    preprocess: Any = None,
    detection: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    provider: str = CPU,
) -> Path:
    """Export a model to an ONNX file that takes what you have, says what you want, and is proven on your data.

    The file holds the preprocessing, the model, and the scores and names of its outputs; `docs/onnx.md` describes it.
    It is compared with PyTorch on all of `data`; the comparison is written beside it as <name>.parity.json (parity.json
    for model.onnx). The module is left as it is; LoRA layers are merged on a copy.

    Args:
        model: a module with float32 weights, a `Result`, or the folder of a run.
        path: the file; appears whole or not at all. Weights of 2 GiB and more go to <path>.data beside it.
        data: labelled samples to prove it on, as `evaluate` takes them; for a run, default: its validation data where
            that can be read again. For detection pictures without labels.
        example: for a module: a batch as it takes it, Tensor (B, ...) or dict of Tensors. Default: of `data`.
        inputs: what the file takes. "raw": pictures as bytes (B, H, W, 3) of any size; padded token numbers; the
            columns of a table by name. "strings": texts, through onnxruntime-extensions. "tensor": what the model
            takes. "auto": raw where the preprocessing is one of pyft's own, else tensor.
        precision: "fp32"; "fp16" or "int8" where the metric on `data`, which must be labelled, drops by at most
            `max_drop`.
        opset: ONNX operator set; default: the one that torch recommends.
        max_drop: in the unit of the metric; of an error relative.
        classes, task, kind, preprocess: of a module, as for `finetune`; of a run, what it keeps. `task` may also be
            "detection": the module then gives boxes (B, N, 4), xyxy in pixels of its input, and class logits (B, N, C).
        detection: {"iou": 0.5, "score": 0.05, "max_boxes": 100}, limits of the suppression of overlapping boxes.
        metadata: further entries of the file, text or JSON-able.
        provider: the onnxruntime provider that the file is proven on.

    Returns:
        The path.

    Raises:
        ExportError: the model cannot be traced, or the file does not behave like it, which is then kept as
            <name>.failed.onnx; or no file of the lower precision holds `max_drop`.
        ConfigError: an argument does not fit.
        DataError: the data cannot be used.
        MissingExtraError: a package that is needed is not installed.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> folder = tempfile.mkdtemp()
    >>> made = export_onnx(net, f"{folder}/net.onnx", example=torch.randn(3, 4), classes=["no", "yes"])
    >>> from pyft.export.run import OnnxModel
    >>> [value.name for value in OnnxModel(made).outputs]
    ['logits', 'scores', 'label_index', 'label']
    """
    words = {name: value for name, value in locals().items() if name not in ("model", "path")}
    return export_with_proof(model, path, **words)[0]


def export_with_proof(
    model: Any,
    path: str | os.PathLike[str],
    *,
    example: Any = None,
    data: Any = None,
    inputs: Any = "auto",
    precision: Any = "fp32",
    max_drop: float = 0.01,
    opset: int | None = None,
    detection: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    provider: str = CPU,
    **about: Any,
) -> tuple[Path, Parity | None, Samples | None]:
    """`export_onnx`, with the comparison and the samples that it was made on; None where there were none."""
    _check_words(inputs, precision, metadata)
    exported, samples = _opened(model, data, **about)
    exported = replace(exported, metadata={**exported.metadata, **(metadata or {})})
    if precision != "fp32" and (samples is None or samples.targets is None):
        raise ConfigError(f"precision={precision!r}: its price is measured on labelled samples: give data=")
    samples = samples or stand_ins(exported.preprocess)
    if example is None:
        example = example_of(exported, samples)
    with _on_the_cpu(exported.module):
        written = write_onnx(exported, example, path, inputs=inputs, opset=opset, detection=detection)
        proof = prove_written(exported, written, samples, precision=precision, max_drop=max_drop, provider=provider)
    return written, proof, samples


@dataclass(frozen=True)
class Exported:
    """A model and all that its file will say of it.

    Attributes:
        module: in any mode.
        problem: "classification", "multilabel", "regression", "detection", or None where it is not known.
        preprocess: an object with `spec()`, a function, or None.
        target_scale: the unit of a regression's outputs.
        metadata: entries of the file.
    """

    module: nn.Module
    kind: Kind | None
    problem: str | None
    classes: Sequence[str] | None
    preprocess: Any
    target_scale: TargetScale | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def spec(self) -> dict[str, Any] | None:
        """The preprocessing spec; None where there is none."""
        return None if self.preprocess is None else spec_of(self.preprocess)


def write_onnx(
    exported: Exported,
    example: torch.Tensor | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    inputs: Form | Literal["auto"] = "auto",
    opset: int | None = None,
    detection: Mapping[str, Any] | None = None,
) -> Path:
    """Write the file, compared with the model on `example` only."""
    spec = exported.spec()
    form = form_of(spec, example) if inputs == "auto" else inputs
    scale = exported.target_scale
    return export_module(
        exported.module, example, path, inputs=form, classes=exported.classes, task=exported.problem,
        kind=exported.kind, preprocess=spec, target=None if scale is None else scale.to_dict(), detection=detection,
        metadata={"pyft.weights_hash": fingerprint_state(exported.module), **exported.metadata}, opset=opset,
    )  # fmt: skip


def form_of(spec: Mapping[str, Any] | None, example: torch.Tensor | Mapping[str, torch.Tensor]) -> Form:
    """ "raw" where the preprocessing is one of pyft's own and makes just these inputs, else "tensor"."""
    kind = (spec or {}).get("kind")
    if isinstance(example, Mapping):
        return "raw" if kind == "text" and "input_ids" in example else "tensor"
    return "raw" if kind in ("image", "table", "array") else "tensor"


def prove_written(
    exported: Exported,
    path: Path,
    samples: Samples | None,
    *,
    precision: str = "fp32",
    max_drop: float = 0.01,
    provider: str = CPU,
) -> Parity | None:
    """Compare the file with the model on the samples, and lower its precision; None where there are no samples."""
    if samples is None or exported.problem == "detection":
        return None
    scale = exported.target_scale
    given: dict[str, Any] = {
        "problem": exported.problem or "regression",
        "classes": exported.classes,
        "report": report_of(path),
        "to_value": None if scale is None else scale.unscale,
    }
    module, preprocess = exported.module, exported.preprocess
    with probing(module):
        parity = prove(path, module, samples, preprocess, provider=provider, **given)
        if precision != "fp32":
            parity = lower(path, precision, module, samples, preprocess, max_drop=max_drop, **given)
    return parity


def report_of(path: Path) -> Path:
    """Where the comparison of a file is written."""
    return path.with_name("parity.json" if path.name == "model.onnx" else f"{path.stem}.parity.json")


def stand_ins(preprocess: Any) -> Samples | None:
    """Samples that any model of texts or pictures takes; None for other data."""
    kind = spec_of(preprocess).get("kind") if preprocess is not None else None
    if kind == "text":
        return Samples("text", TEXTS, None, "texts of pyft's own, as there is no data to read")
    if kind == "image":
        image = need("PIL.Image", "image", "reading images")
        generator = torch.Generator().manual_seed(0)
        noise = [
            torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).numpy() for size in PICTURE_SIZES
        ]
        return Samples("image", [image.fromarray(pixels) for pixels in noise], None, "pictures of noise")
    return None


def run_metadata(folder: Path, metrics: Mapping[str, float]) -> dict[str, Any]:
    """What the file says of its run: name, columns of the table, fingerprint of the data, metrics.

    Args:
        folder: of the run.
        metrics: name to value; one that is not finite becomes null.
    """
    data = read_config(folder)["data"]
    columns = data.get("columns")
    return {
        "pyft.run": folder.resolve().name,
        **({} if columns is None else {"pyft.columns": list(columns)}),
        "pyft.data_hash": data["fingerprint"],
        "pyft.metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
    }


def example_of(exported: Exported, samples: Samples | None) -> Any:
    """The first samples as the model takes them."""
    if samples is None:
        raise ConfigError("example: give a batch as the model takes it, Tensor (B, ...) or dict of Tensors; or data=")
    few = samples.subset(range(min(EXAMPLE_SIZE, len(samples))))
    batch: Batch = next(iter(Batches(few, exported.preprocess, EXAMPLE_SIZE, shuffle=False).epoch(0)))
    return batch.inputs


def run_samples(config: Mapping[str, Any], preprocess: Any) -> Samples:
    """The validation samples of a run, or its training samples where there are none, read again.

    Raises:
        DataError: its data cannot be read any more.
    """
    arguments = config["arguments"]
    if is_description(arguments["data"]):
        raise DataError("the data of the run was given from Python, which no file keeps: give data=")
    keys = ("task", "val", "stratify", "seed", "text_column", "label_column")
    form = table_form(config["data"].get("columns"), preprocess)
    data = load_data(arguments["data"], **{key: arguments[key] for key in keys}, form=form)
    if data.val is None:
        return replace(data.train, name="training samples")
    return replace(data.val, name="validation samples")


# ---------------------------------------------------------------- what is exported


def _check_words(inputs: Any, precision: Any, metadata: Mapping[str, Any] | None) -> None:
    if inputs not in ("auto", *FORMS):
        raise ConfigError(f"inputs={inputs!r}: expected 'auto', {', '.join(map(repr, FORMS))}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
    own = [key for key in metadata or {} if str(key).startswith("pyft.")]
    if own:
        raise ConfigError(
            f"metadata: entries that begin with 'pyft.' are pyft's own, got {own[0]!r}: choose another key"
        )


def _opened(
    model: Any, data: Any, classes: Any = None, task: str | None = None, kind: Any = None, preprocess: Any = None
) -> tuple[Exported, Samples | None]:
    """The model with what it keeps and what was given, and the samples where there are any."""
    detects = task is not None and task.rpartition("-")[2] == "detection"
    subject = open_subject(model, "auto" if task is None or detects else task, preprocess, classes, "torch")
    assert subject.module is not None
    subject = replace(subject, kind=kind or subject.kind)
    folder = model.run_dir if isinstance(model, Result) else None if isinstance(model, nn.Module) else Path(model)
    if detects:
        samples = None if data is None else load_samples(
            data, kind="image", problem="classification", classes=None, labels="ignored"
        )  # fmt: skip
    elif data is not None:
        subject, samples = labelled(subject, data, None, None)
    else:
        samples = None if folder is None else _of_run(folder, subject.preprocess)
    problem = "detection" if detects else subject.problem
    metadata: dict[str, Any] = {}
    if folder is not None:
        metrics = model.metrics if isinstance(model, Result) else read_metrics(folder)
        metadata = run_metadata(folder, metrics)
    scale = None if folder is None else model.target_scale if isinstance(model, Result) else read_target_scale(folder)
    assert subject.module is not None
    return Exported(
        subject.module, subject.kind, problem, subject.classes, subject.preprocess, scale, metadata
    ), samples


@contextlib.contextmanager
def _on_the_cpu(module: nn.Module) -> Iterator[None]:
    """The module's tensors on the CPU, where the file is compared with it, and on their device again afterwards."""
    device = next((value.device for value in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    if device.type == "cpu":
        yield
        return
    module.cpu()
    try:
        yield
    finally:
        module.to(device)


def _of_run(folder: Path, preprocess: Any) -> Samples | None:
    """The run's own samples; None for texts and pictures that cannot be read any more, as pyft's own will do."""
    try:
        return run_samples(read_config(folder), preprocess)
    except DataError as error:
        if stand_ins(preprocess) is not None:
            return None
        raise DataError(f"the data of the run is needed as an example of its inputs: {error}") from None
