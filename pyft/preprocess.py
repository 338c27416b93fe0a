"""How raw samples become what the model takes: chosen for a run, written down with it, read again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyft.data.images import ImagePreprocess
from pyft.data.preprocess import ArrayPreprocess, preprocess_from_spec
from pyft.data.raw import listed
from pyft.data.table_preprocess import TablePreprocess
from pyft.data.table_rows import TableForm, TableRows
from pyft.data.text import TextPreprocess
from pyft.errors import ConfigError
from pyft.models.load import LoadedModel
from pyft.samples import Data, Kind, Samples

if TYPE_CHECKING:
    from pyft.run_dir import OpenRun

DEFAULT_IMAGE_SIZE = 224


def wanted_form(preprocess: Any, model: Any) -> TableForm | None:
    """How a table must be read for a run, so far as its arguments tell: by `preprocess`, or as for an earlier run.

    Args:
        preprocess: the user's; see `choose_preprocess`.
        model: the argument `model`; the folder of a run tells what its model takes.
    """
    from pyft.run_dir import is_run, read_config, read_preprocess

    if preprocess is None and isinstance(model, (str, Path)) and is_run(model):
        columns = read_config(model)["data"].get("columns")
        return None if columns is None else table_form(columns, read_preprocess(model))
    if preprocess == "table" or (isinstance(preprocess, Mapping) and preprocess.get("kind") == "table"):
        preprocess = TablePreprocess() if preprocess == "table" else TablePreprocess.from_spec(preprocess)
    return preprocess.form() if isinstance(preprocess, TablePreprocess) else None


def table_form(columns: Sequence[str] | None, preprocess: Any) -> TableForm | None:
    """How a table must be read for a model that was tuned on these columns with this preprocessing; None: any way."""
    if isinstance(preprocess, TablePreprocess):
        return preprocess.form()
    return None if columns is None else TableForm.of(columns)


def choose_preprocess(
    preprocess: Any,
    loaded: LoadedModel,
    kind: Kind,
    max_length: int | None,
    earlier: OpenRun | None,
    train: Samples | None = None,
) -> tuple[Any, str | None]:
    """The preprocessing of a run, and a note where something was assumed. That of a table is fitted to `train`.

    Args:
        preprocess: the user's: None, "table", an object with `spec()`, a spec, or a function of one raw sample.
        loaded: the model; one that came from a folder brings its tokenizer or its picture size.
        max_length: tokens per text.
        earlier: the run that the model comes from.

    Raises:
        ConfigError: texts without a tokenizer; `max_length` where nothing is cut; a run whose preprocessing was a
            function, which no file keeps.
    """
    if max_length is not None and (kind != "text" or preprocess is not None):
        raise ConfigError(f"max_length={max_length}: it cuts texts that pyft turns into tokens; leave it out here")
    if isinstance(preprocess, Mapping):
        preprocess = preprocess_from_spec(dict(preprocess))
    if isinstance(preprocess, str) and preprocess == "table":
        preprocess = TablePreprocess()
    if isinstance(preprocess, TablePreprocess):
        return _fitted(preprocess, train), None
    if preprocess is not None:
        if not callable(preprocess):
            what = repr(preprocess) if isinstance(preprocess, str) else type(preprocess).__name__
            raise ConfigError(f"preprocess: expected 'table', or a function of one sample giving a Tensor; got {what}")
        return preprocess, None
    if earlier is not None:
        return _of_earlier(earlier, max_length), None
    if kind == "text":
        return _tokenizer(loaded, max_length), None
    if kind == "image":
        return _pictures(loaded)
    if train is not None and isinstance(train.inputs, TableRows):
        made = _fitted(TablePreprocess(), train)
        return made, "preprocess: 'table', as the table holds words or misses numbers"
    return ArrayPreprocess(), None


def _fitted(preprocess: TablePreprocess, train: Samples | None) -> TablePreprocess:
    if preprocess.fitted or train is None:
        return preprocess
    if not isinstance(train.inputs, TableRows):
        raise ConfigError(
            f"preprocess='table': {train.name} holds {train.kind} inputs; expected the columns of a table, or an array "
            f"(N, F) of numbers"
        )
    return preprocess.fit(train.inputs, train.name)


def table_notes(preprocess: Any, data: Data) -> list[str]:
    """What the preprocessing of a table has to say of the data: what it fills in, and words that training lacks."""
    if not isinstance(preprocess, TablePreprocess):
        return []
    notes = list(preprocess.notes)
    for role, samples in (("val", data.val), ("test", data.test)):
        if samples is not None and isinstance(samples.inputs, TableRows):
            notes += preprocess.surprises(samples.inputs, f"{samples.name} ({role})")
    return notes


def tell_surprises(preprocess: Any, samples: Samples) -> None:
    """Warn of words of a table that training has not seen: the model then works on less than the user may think."""
    if isinstance(preprocess, TablePreprocess) and isinstance(samples.inputs, TableRows):
        for line in preprocess.surprises(samples.inputs, samples.name):
            warnings.warn(line, UserWarning, stacklevel=3)


def features_hint(preprocess: Any) -> str:
    """How wide the features of a table are and what they are called, for a model that does not take them."""
    if not isinstance(preprocess, TablePreprocess):
        return ""
    names = preprocess.feature_names()
    return (
        f" The table gives F={len(names)} features: {listed(names, 40)}; build the model for {len(names)} inputs, or "
        f"begin it with torch.nn.LazyLinear, which finds the number itself."
    )


def _of_earlier(earlier: OpenRun, max_length: int | None) -> Any:
    if earlier.preprocess is None:
        raise ConfigError(
            f"the run in {earlier.path} was made with a preprocess function, which no file keeps: give preprocess="
        )
    if max_length is not None:
        return TextPreprocess.from_spec({**earlier.preprocess.spec(), "max_length": max_length})
    return earlier.preprocess


def _tokenizer(loaded: LoadedModel, max_length: int | None) -> TextPreprocess:
    if loaded.folder is None:
        raise ConfigError(
            "preprocess: a module of your own needs to be told how texts become tensors: give "
            "preprocess=pyft.data.text.TextPreprocess.from_folder(folder with tokenizer.json), or an object with encode"
            " and collate"
        )
    return TextPreprocess.from_folder(loaded.folder, max_length)


def _pictures(loaded: LoadedModel) -> tuple[ImagePreprocess, str]:
    """As the model's folder says, else 224 pixels and the statistics of ImageNet."""
    path = None if loaded.folder is None else loaded.folder / "preprocessor_config.json"
    if path is None or not path.is_file():
        note = (
            f"preprocess: images become {DEFAULT_IMAGE_SIZE} pixels square, scaled with ImageNet's mean and deviation"
        )
        return ImagePreprocess(DEFAULT_IMAGE_SIZE), f"{note}; give preprocess= for anything else"
    return _from_transformers(path)


def _from_transformers(path: Path) -> tuple[ImagePreprocess, str]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    resize, crop = (_short_side(config.get(key)) for key in ("size", "crop_size"))
    size = (crop if config.get("do_center_crop", crop is not None) else None) or resize or DEFAULT_IMAGE_SIZE
    statistics = {}
    if config.get("do_normalize", True):
        statistics = {key: config[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in config}
    else:
        statistics = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    made = ImagePreprocess(size, max(resize or size, size), scale=scale, **statistics)
    return made, f"preprocess: images become {size} pixels square, as {path.name} of the model says"


def _short_side(size: Any) -> int | None:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    return int(size) if isinstance(size, (int, float)) else None


def spec_of(preprocess: Any) -> dict[str, Any]:
    """What preprocess.json and the ONNX file keep; a function is only named."""
    spec = getattr(preprocess, "spec", None)
    if callable(spec):
        return spec()
    name = getattr(preprocess, "__qualname__", type(preprocess).__qualname__)
    return {"kind": "callable", "name": name}


def preprocess_of(spec: Mapping[str, Any] | None) -> Any:
    """The preprocessing that a spec describes; None for a function of the user's, or where there is no spec."""
    if spec is None or spec.get("kind") == "callable":
        return None
    return preprocess_from_spec(dict(spec))
