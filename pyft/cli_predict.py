"""What `pyft predict` does with the words it is given: texts, files, folders of images, arrays."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyft.errors import ConfigError, DataError

TABLES = (".tsv", ".csv")


def prediction_lines(
    model: Path,
    words: Sequence[str],
    *,
    text_column: str | None,
    batch_size: int,
    as_json: bool,
    provider: str | None = None,
) -> Iterator[str]:
    """One line per sample: label, probability and input with tabs between, or JSON.

    Raises:
        ConfigError, DataError, ExportError: as `pyft.predict`; nothing has been printed then.
    """
    predict, opened = _opened(model, provider)
    kind, classes, form = describe_model(opened)
    names, raw = READERS[kind](words, form if kind == "array" else text_column)
    rows = predict(opened, raw, batch_size=batch_size, text_column=text_column)
    for name, row in zip(names, rows, strict=True):
        yield json_line(name, row, classes) if as_json else text_line(name, row)


def _opened(model: Path, provider: str | None) -> tuple[Callable[..., list[dict[str, Any]]], Any]:
    """What predicts, and the model for it: a file is opened once, and without torch, whose import takes seconds."""
    if model.suffix == ".onnx":
        from pyft.onnx_runtime import load, predict

        return predict, load(model) if provider is None else load(model, provider=provider)
    from pyft.evaluate import predict as predict_any

    if provider is not None:
        raise ConfigError(f"--provider {provider}: torch runs {model}; give its .onnx file")
    return predict_any, model


def describe_model(model: Any) -> tuple[str, list[str] | None, Any]:
    """Kind of input, class names, and how tables are read (a `TableForm`), of a run's folder or an opened ONNX file.

    Raises:
        ConfigError: neither, or a file that does not say what it takes.
    """
    if not isinstance(model, Path):
        return _describe_file(model)
    from pyft.run_dir import is_run, read_config, read_preprocess

    if not is_run(model):
        state = "is neither" if model.exists() else "does not exist"
        raise ConfigError(f"{model} {state}; expected the folder of a run or a .onnx file")
    from pyft.preprocess import table_form

    config = read_config(model)
    form = table_form(config["data"].get("columns"), read_preprocess(model))
    return config["data"]["kind"], config["classes"], form


def _describe_file(model: Any) -> tuple[str, list[str] | None, Any]:
    from pyft.onnx_runtime.samples import form_of

    meta = model.meta
    if meta.kind not in READERS:
        raise ConfigError(
            f"{model.path} does not say what it takes, as files made by pyft do; use pyft.predict(..., task=)"
        )
    return meta.kind, meta.classes, form_of(meta) if meta.kind == "array" else None


def read_texts(words: Sequence[str], text_column: str | None) -> tuple[list[str], list[str]]:
    """The texts themselves: a word that names a file is read, "-" is standard input, any other is a text."""
    from pyft.data.folders import IMAGE_SUFFIXES

    texts: list[str] = []
    for word in words:
        path = Path(word)
        if word == "-":
            texts += _lines(sys.stdin.read(), "standard input")
        elif path.suffix.lower() in TABLES and _is_file(path):
            texts += _read(path, "text", text_column, None)
        elif _is_file(path):
            texts += _lines(_decoded(path), str(path))
        elif path.suffix.lower() in (*TABLES, *IMAGE_SUFFIXES, ".txt", ".npy") and " " not in word:
            raise DataError(f"{word}: no such file; the model takes texts, and tables and .txt files of texts")
        else:
            texts.append(word)
    return texts, texts


def read_images(words: Sequence[str], text_column: str | None) -> tuple[list[str], list[Path]]:
    """Paths of image files; a folder stands for all images below it."""
    from pyft.data.folders import IMAGE_SUFFIXES

    paths: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise DataError(f"{word}: no image in this folder; looked for {', '.join(IMAGE_SUFFIXES)}")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"{word}: no such file; the model takes images")
    return [str(path) for path in paths], paths


def read_arrays(words: Sequence[str], form: Any) -> tuple[list[str], Any]:
    """Rows of .npy files and tables, one after the other: an array (N, ...), or `TableRows` where `form` says so."""
    import numpy as np

    from pyft.data.table_rows import TableRows

    names: list[str] = []
    parts: list[Any] = []
    for word in words:
        path = Path(word)
        if not path.is_file():
            raise DataError(f"{word}: no such file; the model takes .npy arrays (N, ...) and tables of numbers")
        is_table = path.suffix.lower() in TABLES
        rows = _read(path if is_table else _array(path), "array", None, form)
        parts.append(rows)
        names += [f"{word}:{number}" for number in range(len(rows))]
    if all(isinstance(part, TableRows) for part in parts):
        return names, TableRows.join(parts)
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise DataError(f"the files hold samples of different shapes: {', '.join(map(str, shapes))}")
    return names, np.concatenate(parts)


READERS: dict[str, Any] = {"text": read_texts, "image": read_images, "array": read_arrays}


def _is_file(path: Path) -> bool:
    """A long text is no file name, and asking the system about one fails."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8; the model takes texts") from None


def _lines(text: str, name: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{name}: no text in it")
    return lines


def _read(source: Any, kind: Any, text_column: str | None, form: Any) -> Any:
    from pyft.data.reading import in_form, read_arrays

    raw = read_arrays(source, kind, text_column, None, labels_required=False, columns=form)
    return in_form(raw, form).inputs


def _array(path: Path) -> Any:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a .npy array of numbers ({error})") from None
    if not isinstance(array, np.ndarray) or array.ndim < 2:
        raise DataError(f"{path}: expected one array of N samples, (N, ...)")
    return array.astype(np.float32) if array.dtype == np.float64 else array


# ---------------------------------------------------------------- one line per sample


def text_line(name: str, row: dict[str, Any]) -> str:
    """Label, probability and input; value and input for regression.

    >>> text_line("a text", {"label": "yes", "score": 0.75})
    'yes\\t0.7500\\ta text'
    """
    if "value" in row:
        values = [row["value"]] if isinstance(row["value"], float) else row["value"].tolist()
        return "\t".join([*(f"{value:.6g}" for value in values), name])
    if "labels" in row:
        return f"{','.join(row['labels']) or '-'}\t{name}"
    return f"{row['label']}\t{row['score']:.4f}\t{name}"


def json_line(name: str, row: dict[str, Any], classes: list[str] | None) -> str:
    """The whole prediction, probabilities by class name."""
    found: dict[str, Any] = {"input": name}
    for key, value in row.items():
        if key == "scores":
            values = [round(float(score), 6) for score in value]
            found[key] = dict(zip(classes, values, strict=True)) if classes else values
        else:
            found[key] = value.tolist() if hasattr(value, "tolist") else value
    return json.dumps(found, ensure_ascii=False)
