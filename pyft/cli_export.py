"""What `pyft export` does: a run's model as an ONNX file, compared with PyTorch on the run's own data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyft.core.files import write_atomic
from pyft.errors import DataError

if TYPE_CHECKING:
    from pyft.run_dir import OpenRun
    from pyft.samples import Samples

EXAMPLE_SIZE = 4
BATCH_SIZE = 64

# Where a run's texts are gone, these of different lengths show whether the file behaves like the model.
TEXTS = [
    "ok",
    "Where is my order?",
    "The second parcel came this morning, but the invoice in it is for somebody else.",
    "Please call me back after four, I would like to talk about the offer you sent last week, and about the "
    "two machines that are still waiting to be repaired.",
]


def export_run(run: Path, output: Path | None) -> Iterator[str]:
    """Write the ONNX file; the lines say where it is and how it compares.

    Args:
        run: the folder of a run.
        output: where to write; default: model.onnx in that folder.

    Raises:
        ConfigError: not a run, or one whose model only its owner can build and that was not exported.
        CheckpointError: the run is not finished.
        ExportError: the file does not behave like the model.
    """
    from pyft.run_dir import can_build, open_run

    target = run / "model.onnx" if output is None else output
    exported = run / "model.onnx"
    if not can_build(run) and exported.is_file():
        yield from copy_exported(exported, target)
        return
    opened = open_run(run)
    samples, whose = comparison_samples(opened)
    yield from export_opened(opened, samples, target)
    yield f"compared on {len(samples)} {whose}"


def copy_exported(exported: Path, target: Path) -> Iterator[str]:
    """The model is one of the user's own, which cannot be built here: its file from the end of the run is used."""
    if target.exists() and target.samefile(exported):
        yield f"{exported} is there already, written at the end of the run"
        return
    content = exported.read_bytes()
    write_atomic(target, lambda file: file.write(content))
    yield f"{target} ({len(content) / 1e6:.1f} MB), the file written at the end of the run"


def export_opened(opened: OpenRun, samples: Samples, target: Path) -> Iterator[str]:
    """Export, compare on `samples`, and say so; the report is <name>.parity.json, parity.json for model.onnx."""
    from pyft.data.batches import Batches
    from pyft.export.onnx import export_onnx, run_metadata
    from pyft.preprocess import spec_of
    from pyft.proof import prove

    few = Batches(
        samples.subset(range(min(EXAMPLE_SIZE, len(samples)))), opened.preprocess, EXAMPLE_SIZE, shuffle=False
    )
    export_onnx(
        opened.module, next(iter(few.epoch(0))).inputs, target, classes=opened.classes, task=opened.problem,
        kind=opened.kind, preprocess=spec_of(opened.preprocess),
        metadata=run_metadata(opened.path.resolve().name, opened.config["data"].get("columns"), opened.target_scale),
    )  # fmt: skip
    report = target.with_name("parity.json" if target.name == "model.onnx" else f"{target.stem}.parity.json")
    parity = prove(
        target, opened.module, samples, opened.preprocess, problem=opened.problem, classes=opened.classes,
        report=report, batch_size=BATCH_SIZE,
        to_value=None if opened.target_scale is None else opened.target_scale.unscale,
    )  # fmt: skip
    yield f"{target} ({target.stat().st_size / 1e6:.1f} MB)"
    yield str(parity)


def comparison_samples(opened: OpenRun) -> tuple[Samples, str]:
    """The run's validation samples where its data can still be read, else a few texts of pyft's own.

    Raises:
        DataError: the data is gone, and the model does not take texts.
    """
    from pyft.samples import Samples

    try:
        samples, whose = _own_samples(opened)
    except DataError as error:
        if opened.kind != "text":
            raise DataError(f"the data of the run is needed as an example of its inputs: {error}") from None
        return Samples("text", TEXTS, None, "texts"), "texts of pyft's own, as the run's data cannot be read"
    return samples, whose


def _own_samples(opened: OpenRun) -> tuple[Samples, str]:
    from pyft.data.sources import load_data
    from pyft.preprocess import table_form
    from pyft.run_dir import is_description

    arguments: dict[str, Any] = opened.config["arguments"]
    if is_description(arguments["data"]):
        raise DataError("it was given from Python, which no file keeps")
    keys = ("task", "val", "stratify", "seed", "text_column", "label_column")
    form = table_form(opened.config["data"].get("columns"), opened.preprocess)
    data = load_data(arguments["data"], **{key: arguments[key] for key in keys}, form=form)
    return (data.train, "training samples") if data.val is None else (data.val, "validation samples")
