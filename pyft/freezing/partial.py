"""`pyft.train_only`: of this weight, only these rows, columns or blocks train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyft.errors import ConfigError
from pyft.freezing.entries import make_entries
from pyft.freezing.eval_mode import kept
from pyft.freezing.lean.swap import plain_class
from pyft.freezing.partial_modules import FORMS, PLAIN
from pyft.freezing.parts import attached, named_weights
from pyft.freezing.plan import FreezePlan, make_from, unwrap
from pyft.freezing.select_rows import Chosen
from pyft.freezing.selection import Selection, nearest, require_values


def train_only(
    model: nn.Module,
    name: str | nn.Parameter | None = None,
    *,
    rows: Any = None,
    columns: Any = None,
    blocks: Any = None,
    block_size: tuple[int, int] = (32, 32),
) -> FreezePlan:
    """Let only a part of a weight train. Make the optimizer afterwards.

    Forward uses the whole weight. Backward takes the gradient of the part only, `dW[rows] = dY[:, rows]^T X`, and keeps
    only the chosen columns of the input X. The part is a parameter of its own, `<name>_part`, and the whole weight is a
    frozen one: gradient, optimizer state, weight decay, clipping and DistributedDataParallel see the part only, with
    any optimizer. `state_dict` is that of the plain layer. Every call adds to the ones before; what has
    `requires_grad=False` is frozen as by `pyft.freeze`, and everything else trains as it did.

    Layers: exactly Linear, Conv1d/2d/3d, Embedding, LayerNorm, RMSNorm, GroupNorm, BatchNorm1d/2d/3d. A use of
    `layer.weight` outside the layer's own forward, as in `F.linear(x, embedding.weight)`, sees the right values but
    adds no gradient to the part; weights tied between two layers inside `model` are fine.

    Args:
        model: the model, or one layer.
        name: dotted name of a weight ("encoder.0.weight"), the weight itself, or the name of a layer: then its weight,
            and with `rows` its bias too, train in part, and the rest of the layer is frozen. None: `model` is the
            layer. Other places where a layer's weight is tied to are seen within `model` only.
        rows: outputs: features of a Linear, channels of a convolution, tokens of an Embedding, entries of a bias or
            norm. A slice, a mask (rows,), indices or one index, from the end where negative. Rows side by side
            are a view of the weight, others a copy.
        columns: inputs: features, channels (within its group), dimensions of an Embedding. With `rows`, their crossing.
        blocks: instead of both, places (row, column) in the grid of blocks, or a mask of the grid; Linear layers, and
            convolutions with groups=1.
        block_size: rows and columns of a block; must divide the weight's shape.

    Returns:
        The plan that is now in force: print it, `plan.verify(model)`, `plan.release(model)`.

    Raises:
        ConfigError: nothing of that name, a layer of another kind, or indices that do not fit.

    >>> layer = nn.Linear(3, 4)
    >>> plan = train_only(layer, rows=[0, 2])
    >>> plan.num_trainable, [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
    (8, [(2, 3), (2,)])
    """
    if isinstance(model, nn.Parameter) or not isinstance(model, nn.Module):
        raise ConfigError(
            f"train_only: {type(model).__name__} came: a weight alone does not know its layer: give "
            "train_only(layer, rows=...), or train_only(model, weight, rows=...) with the weight or its name"
        )
    model = unwrap(model)
    require_values(model)
    named = dict(named_weights(model, remove_duplicate=False))
    first = {id(parameter): key for key, parameter in named_weights(model)}
    weights, rest = _named(model, named, name, rows is not None)
    parts = {key: Chosen(entries) for key, entries in attached(model).items()}
    frozen = {key for key, p in named.items() if not p.requires_grad} | rest
    for key in weights:
        # Of a layer, the bias has rows only; a bias that is named itself is told so.
        across = {} if key != name and key.endswith("bias") else {"columns": columns, "blocks": blocks}
        entries = make_entries(named[key].shape, rows=rows, **across, block_size=block_size, name=f"'{key}'")
        parts[first[id(named[key])]] = Chosen(entries)
    partly = {key for key, parameter in named.items() if first[id(parameter)] in parts}
    modules = {key for key, module in model.named_modules() if kept(module) and not list(module.parameters())}
    return make_from(model, Selection(frozenset(frozen - partly), frozenset(modules)), parts).apply(model)


def _named(
    model: nn.Module, named: Mapping[str, nn.Parameter], name: Any, with_bias: bool
) -> tuple[list[str], set[str]]:
    """Names of the weights that train in part, and of those of the same layer that are frozen."""
    if isinstance(name, nn.Parameter):
        found = [key for key, parameter in named.items() if parameter is name]
        if not found:
            raise ConfigError("train_only: the weight is not one of this model's: give a model that holds it")
        return found[:1], set()
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"train_only: name is {type(name).__name__}: a dotted name (str) or a weight is expected")
    if name is not None and name in named:
        return [name], set()
    modules = dict(model.named_modules(remove_duplicate=False))
    if (name or "") not in modules:
        near = nearest(name or "", [*named, *modules])
        raise ConfigError(f"train_only: there is no weight or layer '{name}'; {near}")
    layer = modules[name or ""]
    kind = plain_class(type(layer))
    if kind not in FORMS and kind not in PLAIN:
        kinds = ", ".join(form.__name__ for form in FORMS)
        raise ConfigError(
            f"train_only: '{name or 'model'}' is a {kind.__name__}; parts can be trained of "
            f"exactly {kinds}. Name a layer or weight inside, or use pyft.freeze(model, {{glob: pyft.Rows(...)}})"
        )
    prefix = f"{name}." if name else ""
    own = [f"{prefix}{key}" for key in ("weight", "bias") if f"{prefix}{key}" in named]
    if not own:
        raise ConfigError(f"train_only: this {type(layer).__name__} has no weight")
    return (own, set()) if with_bias else (own[:1], set(own[1:]))
