"""State tensors of a parameter: made at its first step, and brought to the optimizer's own form when loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyft.core.loader import load_cuda_core
from pyft.ops import rounding
from pyft.ops.grad_norm import core_takes
from pyft.ops.rules import NEVER_NEGATIVE, RULES, Rule
from pyft.ops.update import EXTRA
from pyft.optim.options import STATE_DTYPES, Settings

State = MutableMapping[str, Any]
_EVERY_MOMENT = frozenset(name for rule in RULES.values() for name in rule.kept)


def moment_dtype(param: Tensor, settings: Settings) -> torch.dtype:
    """In what the moments of a parameter are kept; int8 stands for 8 bits of either kind."""
    return torch.float64 if param.dtype == torch.float64 else STATE_DTYPES[settings.state_dtype]


def counts_steps(rule: Rule, param: Tensor, settings: Settings) -> bool:
    """Whether a step counter is kept: where the rule needs it, or random bits do."""
    narrow = moment_dtype(param, settings) in (torch.bfloat16, torch.int8) and bool(rule.kept)
    return rule.counts or narrow or (settings.weights == "stochastic" and param.dtype == torch.bfloat16)


def keys_of(rule: Rule, param: Tensor, settings: Settings, decay_to_init: float) -> tuple[str, ...]:
    """Keys of the state that a step of this rule uses, in the order of the core's slots."""
    keys: list[str] = []
    scales: list[str] = []
    for name in rule.kept:
        if moment_dtype(param, settings) == torch.int8:
            keys.append(f"{name}_q8")
            scales.append(f"{name}_scale")
        else:
            keys.append(name)
    keys += scales
    if param.dtype == torch.bfloat16 and settings.weights in EXTRA:
        keys.append(EXTRA[settings.weights])
    if decay_to_init != 0.0:
        keys.append("init")
    if counts_steps(rule, param, settings):
        keys.append("step")
    return tuple(keys)


def _like(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(param, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)


def counter_device(param: Tensor) -> torch.device:
    """Where the step counter of a parameter is: where it is used, as with torch's `capturable`, or on the CPU."""
    on_device = param.is_cuda and core_takes(param) and load_cuda_core() is not None
    return param.device if on_device else torch.device("cpu")


def make_entry(key: str, param: Tensor, settings: Settings) -> Tensor:
    """A new state tensor: zeros, or for "init" the parameter's present value."""
    if key == "step":
        return torch.zeros((), dtype=torch.float32, device=counter_device(param))
    if key == "init":
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        dtype = torch.bfloat16 if settings.init_dtype == "bfloat16" else wide
        return _like(param, dtype).copy_(param.detach())
    if key in EXTRA.values():
        return _like(param, torch.int16 if key == "remainder" else torch.bfloat16)
    if key.endswith("_scale"):
        return torch.zeros(-(-param.numel() // rounding.BLOCK), dtype=torch.float32, device=param.device)
    if key.endswith("_q8"):
        return _like(param, torch.uint8 if key.removesuffix("_q8") in NEVER_NEGATIVE else torch.int8)
    return _like(param, moment_dtype(param, settings))


def make_missing(
    states: Sequence[State], keys: Sequence[tuple[str, ...]], make: Callable[[str, int], Tensor]
) -> list[dict[str, Tensor]]:
    """Make the state tensors that parameters lack.

    Those of one key are made one after the other: of small parameters they then follow each other in memory, and an
    update that goes through all of them reads them faster than if each parameter's lay together.

    Args:
        states: the state of each parameter.
        keys: what each needs.
        make: gets a key and the number of a parameter.

    Returns:
        For each parameter what was made, in the order of its keys.
    """
    missing = [[key for key in wanted if key not in state] for state, wanted in zip(states, keys, strict=True)]
    made: list[dict[str, Tensor]] = [dict.fromkeys(names) for names in missing]  # type: ignore[misc]
    for key in dict.fromkeys(key for names in missing for key in names):
        for place, names in enumerate(missing):
            if key in names:
                made[place][key] = make(key, place)
    return made


def _in_layout(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` itself if dtype, device and, where the core uses it, strides are right; else a copy that has them."""
    value = value.to(device=param.device)
    if value.dtype == dtype and (value.stride() == param.stride() or not core_takes(param)):
        return value
    return _like(param, dtype).copy_(value)


def _adopt_moment(name: str, param: Tensor, state: State, dtype: torch.dtype) -> None:
    coded, scale = f"{name}_q8", f"{name}_scale"
    held = state[coded] if coded in state else state[name]
    if held.shape != param.shape:
        raise ValueError(f"state '{name}' has shape {tuple(held.shape)}, its parameter {tuple(param.shape)}")
    unsigned = name in NEVER_NEGATIVE
    if coded in state:
        if dtype == torch.int8:
            laid_out = _in_layout(state[coded], param, torch.uint8 if unsigned else torch.int8)
            if laid_out.stride() == state[coded].stride():
                state[coded] = laid_out
                state[scale] = state[scale].to(device=param.device, dtype=torch.float32)
                return
        # Blocks are runs of memory, so another layout has others: through fp32.
        codes = state.pop(coded)
        order = rounding.memory_order(codes)
        wide = torch.empty_like(codes, dtype=torch.float32)
        rounding.write_flat(
            wide, order, rounding.decode_int8(rounding.flat(codes, order), state.pop(scale).to(codes.device))
        )
        state[name] = wide
    if dtype != torch.int8:
        state[name] = _in_layout(state[name], param, dtype)
        return
    value = _in_layout(state.pop(name), param, torch.float32)
    order = rounding.memory_order(param)
    flat = rounding.flat(value, order)
    # Half a code: to the nearest.
    half = torch.full((flat.numel(),), 1 << 31, dtype=torch.int64, device=flat.device)
    codes, scales = rounding.encode_int8(flat, half, not unsigned)
    state[coded] = _like(param, codes.dtype)
    rounding.write_flat(state[coded], order, codes)
    state[scale] = scales


def adopt(param: Tensor, state: State, moments: tuple[str, ...], settings: Settings) -> None:
    """Bring loaded state to the form of this optimizer: dtype, layout and device of its moments, and an fp32 counter.

    Args:
        param: the parameter.
        state: its state. Changed in place.
        moments: names of moments that it may hold.
        settings: those of the optimizer.

    Raises:
        ValueError: a moment has another shape than the parameter.
    """
    step, device = state.get("step"), counter_device(param)
    if step is not None and not (
        isinstance(step, Tensor) and step.dtype == torch.float32 and step.device == device and step.ndim == 0
    ):
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    dtype = moment_dtype(param, settings)
    for name in moments:
        if state.get(name) is not None or f"{name}_q8" in state:
            _adopt_moment(name, param, state, dtype)
        elif name in state:
            # torch.optim.SGD writes None where there is no buffer yet.
            del state[name]
    wanted = EXTRA.get(settings.weights) if param.dtype == torch.bfloat16 else None
    for key in EXTRA.values():
        if key in state and key != wanted:
            warnings.warn(
                f"the loaded state holds '{key}', which weights='{settings.weights}' does not use: the low bits of "
                "these parameters are dropped",
                UserWarning,
                stacklevel=5,
            )
            del state[key]
        elif key in state:
            state[key] = _in_layout(state[key], param, torch.int16 if key == "remainder" else torch.bfloat16)
    if "init" in state:
        narrow = settings.init_dtype == "bfloat16"
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        state["init"] = _in_layout(state["init"], param, torch.bfloat16 if narrow else wide)


def check_moments(state: State, rule: Rule, moments: tuple[str, ...], owner: str) -> None:
    """Refuse loaded state of another kind of optimizer: moments that are missing would be zeros beside a high counter.

    Args:
        state: of one parameter.
        rule: its rule.
        moments: names of moments that it may hold.
        owner: the name of the optimizer's class.

    Raises:
        ValueError: a moment is missing, or is one of another class.
    """
    foreign = sorted(_EVERY_MOMENT.difference(moments) & set(state))
    needed = [name for name in rule.kept if name in moments and rule.counts]
    missing = [name for name in needed if name not in state and f"{name}_q8" not in state]
    if foreign or (missing and not rule.factored):
        raise ValueError(
            f"the loaded state is not that of {owner}: it holds {', '.join(sorted(state))}"
            + (f", but not {', '.join(missing)}" if missing else "")
        )


class Shielded:
    """Keeps torch's load_state_dict from casting a state tensor to the dtype of its parameter."""

    def __init__(self, value: Any) -> None:
        self.value = value


def shield(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A load_state_dict pre-hook of torch: state that will not be cast."""
    shielded = {
        key: {name: Shielded(value) for name, value in of_one.items()} if isinstance(of_one, dict) else of_one
        for key, of_one in state_dict["state"].items()
    }
    return {**state_dict, "state": shielded}


def unshield(of_one: Any) -> None:
    """The reverse, for the state of one parameter."""
    if not isinstance(of_one, dict):
        return
    for name, value in of_one.items():
        if isinstance(value, Shielded):
            # A copy: what the user keeps of the loaded state must not change with every step.
            of_one[name] = value.value.clone() if isinstance(value.value, Tensor) else value.value
