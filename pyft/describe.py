"""The arguments of a run as JSON, and the commands that repeat it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

SMALL_DATACLASS = 6
_MISSING = object()


def describe(value: Any) -> Any:
    """`value` as JSON: plain values as they are, paths absolute, anything else named in angle brackets."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return str(Path(value).resolve())
    if isinstance(value, Mapping):
        named = ((key if isinstance(key, str) else f"<{_name_of(key)}>", part) for key, part in value.items())
        return {key: describe(part) for key, part in named}
    if is_dataclass(value) and not isinstance(value, type) and len(fields(value)) <= SMALL_DATACLASS:
        return {item.name: describe(getattr(value, item.name)) for item in fields(value)}
    if hasattr(value, "tolist") and 0 <= getattr(value, "ndim", -1) <= 1 and len(value.reshape(-1)) <= 1000:
        return value.tolist()
    if isinstance(value, (list, tuple)) and len(value) <= 1000 and all(_is_plain(part) for part in value):
        return [describe(part) for part in value]
    return f"<{_name_of(value)}>"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, os.PathLike)) or is_dataclass(value)


def _name_of(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} {tuple(shape)}"
    name = getattr(value, "__qualname__", None)
    if name is None or "<" in name:
        name = getattr(value, "__name__", type(value).__qualname__).strip("<>")
    if isinstance(value, (list, tuple)):
        return f"{name} of " + ", ".join(_name_of(part) for part in value[:3])
    return f"{name}"


def is_description(value: Any) -> bool:
    """Whether `describe` could only name the value, so that it cannot be given again from the file."""
    if isinstance(value, str):
        return value.startswith("<") and value.endswith(">")
    if isinstance(value, Mapping):
        return any(is_description(part) for part in value.values())
    return isinstance(value, list) and any(is_description(part) for part in value)


def describe_source(value: Any) -> Any:
    """A model or data argument as JSON; paths are made absolute, so that the run can be continued from anywhere."""
    if isinstance(value, str) and not value.startswith("hf:") and Path(value).exists():
        return str(Path(value).resolve())
    if isinstance(value, str) and value.startswith("hf:") and Path(value[3:]).expanduser().is_dir():
        return "hf:" + str(Path(value[3:]).expanduser().resolve())
    if isinstance(value, dict):
        return {str(key): describe_source(part) for key, part in value.items()}
    return describe(value)


def repeat_commands(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str | None]:
    """The Python call, and the shell command where every argument can be typed, that do the run again."""
    changed = {
        key: value for key, value in arguments.items()
        if key not in ("model", "data", "out", "resume", "progress") and value != defaults.get(key, _MISSING)
    }  # fmt: skip
    words = [_python(arguments["model"]), _python(arguments["data"])]
    words += [f"{key}={_stages(value) if key == 'strategy' else _python(value)}" for key, value in changed.items()]
    call = f"pyft.finetune({', '.join(words)})"
    return {"python": call, "shell": _shell_command(arguments["model"], arguments["data"], changed)}


def _python(value: Any) -> str:
    return value if is_description(value) and isinstance(value, str) else repr(value)


def _stages(value: Any) -> str:
    """A strategy as Python: a word, or `pyft.Stage(...)` for each stage."""
    if not isinstance(value, list) or not all(isinstance(stage, Mapping) for stage in value):
        return _python(value)
    stages = (", ".join(f"{key}={_python(part)}" for key, part in stage.items()) for stage in value)
    return f"[{', '.join(f'pyft.Stage({stage})' for stage in stages)}]"


def _shell_command(model: Any, data: Any, changed: Mapping[str, Any]) -> str | None:
    """`pyft train ...`, or None where an argument cannot be typed."""
    parts = dict(data) if isinstance(data, Mapping) else {"train": data}
    train = parts.pop("train", None)
    options = {**changed, **parts}
    typed = [model, train, *parts.values()]
    if not all(isinstance(value, str) for value in typed) or any(map(is_description, [*typed, *changed.values()])):
        return None
    words = ["pyft", "train", model, train]
    for key, value in options.items():
        word = _shell_word(value)
        if word is None:
            return None
        words += [f"--{key.replace('_', '-')}", word]
    return shlex.join(words)


def _shell_word(value: Any) -> str | None:
    if isinstance(value, list) and all(isinstance(part, (str, int, float)) for part in value):
        return ",".join(map(str, value))
    if isinstance(value, (list, dict)):
        return None
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
