"""What `pyft export` does: a run's model as an ONNX file, compared with PyTorch on the run's own data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyft.core.files import write_atomic
from pyft.errors import ConfigError


def export_run(run: Path, output: Path | None, **words: Any) -> Iterator[str]:
    """Write the ONNX file; the lines say where it is and how it compares.

    Args:
        run: the folder of a run.
        output: where to write; default: model.onnx in that folder.
        words: inputs, precision, opset, max_drop, as of `pyft.export_onnx`; None: the default.

    Raises:
        ConfigError: not a run, or one whose model only its owner can build and that was not exported.
        CheckpointError: the run is not finished.
        ExportError: the file does not behave like the model.
    """
    from pyft.run_dir import can_build

    target = run / "model.onnx" if output is None else output
    given = {name: value for name, value in words.items() if value is not None}
    exported = run / "model.onnx"
    if not can_build(run) and exported.is_file():
        if given:
            raise ConfigError(
                f"{', '.join(given)}: the model of {run} is one of your own, which cannot be built here; export "
                f"it from Python: pyft.export_onnx(result, {str(target)!r}, ...)"
            )
        yield from copy_exported(exported, target)
        return
    yield from _exported(run, target, given)


def copy_exported(exported: Path, target: Path) -> Iterator[str]:
    """The model is one of the user's own, which cannot be built here: its file from the end of the run is used."""
    if target.exists() and target.samefile(exported):
        yield f"{exported} is there already, written at the end of the run"
        return
    content = exported.read_bytes()
    write_atomic(target, lambda file: file.write(content))
    yield f"{target} ({len(content) / 1e6:.1f} MB), the file written at the end of the run"


def _exported(run: Path, target: Path, words: dict[str, Any]) -> Iterator[str]:
    from pyft.export_model import export_with_proof

    path, parity, samples = export_with_proof(run, target, **words)
    yield f"{path} ({path.stat().st_size / 1e6:.1f} MB)"
    if parity is not None and samples is not None:
        yield str(parity)
        yield f"compared on {len(samples)} {samples.name}"
