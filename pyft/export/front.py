"""What stands before the model in the file, by the kind of its preprocessing: one file per kind.

A kind is a function of (spec, inputs of the model) that gives a `Graph`. Its inputs are what the user has; its outputs
are named as the inputs of the model that it feeds. An input of the model that it does not feed stays an input of the
file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pyft.errors import ConfigError
from pyft.export.graph import Graph

Form = Literal["raw", "tensor", "strings"]
FORMS = ("raw", "tensor", "strings")

# Form and kind of the preprocessing spec -> where its function is.
FRONTS = {
    ("raw", "image"): "pyft.export.raw_image:image_front",
    ("raw", "text"): "pyft.export.raw_text:text_front",
    ("raw", "table"): "pyft.export.raw_table:table_front",
    ("strings", "text"): "pyft.export.text_strings:strings_front",
}


def front_of(form: Form, spec: Mapping[str, Any] | None, inputs: Sequence[str]) -> Graph | None:
    """The graph that makes the model's inputs from what the user has; None where the model takes just that.

    Args:
        form: "raw", "tensor" or "strings".
        spec: the preprocessing spec, as `preprocess.spec()` gives it.
        inputs: names of the model's inputs.

    Raises:
        ConfigError: there is no such graph for this preprocessing.
    """
    if form not in FORMS:
        raise ConfigError(f"inputs={form!r}: expected one of {', '.join(FORMS)}")
    kind = str((spec or {}).get("kind", ""))
    if form == "tensor" or (form == "raw" and kind == "array"):
        return None
    if (form, kind) not in FRONTS:
        what = "no preprocessing is known" if not kind else f"the preprocessing is of the kind {kind!r}"
        possible = ", ".join(sorted(k for f, k in FRONTS if f == form))
        raise ConfigError(
            f"inputs={form!r} is possible for preprocessing of the kind {possible}, and {what}: give preprocess=, or "
            "inputs='tensor', and the file takes what the model takes"
        )
    module, _, function = FRONTS[form, kind].partition(":")
    make: Callable[[Mapping[str, Any], Sequence[str]], Graph] = getattr(importlib.import_module(module), function)
    return make(spec or {}, inputs)
