"""Which onnxruntime provider ran a file: what the session says, and what its profiler counted."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyft.errors import need
from pyft.export.run import OnnxModel


def provider_fault(model: OnnxModel, provider: str | None) -> str | None:
    """What is wrong where the open session does not run the provider asked for; None where it does.

    Args:
        provider: None: the one that `model.provider` names.
    """
    session = getattr(model, "session", None)
    if session is None:
        return None
    wanted, ran = provider or model.provider, session.get_providers()
    if ran and ran[0] == wanted:
        return None
    return f"{wanted} was asked for, but onnxruntime runs {', '.join(ran) or 'nothing'}"


def nodes_by_provider(model: OnnxModel, provider: str, inputs: Any) -> dict[str, int]:
    """Provider to the number of nodes that it ran for one batch, in a session of its own with the profiler on.

    onnxruntime gives what a provider cannot run to the CPU without a word; this counts it.

    Args:
        inputs: what `model` is called with.

    Returns:
        {} where the model is not a file.
    """
    path, session = model.path, getattr(model, "session", None)
    if path is None or session is None or not path.is_file():
        return {}
    runtime = need("onnxruntime", "onnx", "checking an ONNX file")
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        extensions = sys.modules.get("onnxruntime_extensions")
        if extensions is not None:
            options.register_custom_ops_library(extensions.get_library_path())
        counted = runtime.InferenceSession(os.fspath(path), sess_options=options, providers=[provider])
        feed = inputs if isinstance(inputs, Mapping) else {model.inputs[0].name: inputs}
        counted.run(None, {name: _array(values) for name, values in feed.items()})
        with open(counted.end_profiling(), encoding="utf-8") as file:
            events = json.load(file)
    named = {
        (event["name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    return dict(Counter(provider for _, provider in sorted(named)))


def _array(values: Any) -> Any:
    with contextlib.suppress(AttributeError):
        values = values.detach().cpu().numpy()
    return values
