"""One step of any optimizer rule over lists of tensors, in place: the op, its fake, and its PyTorch reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyft.ops import rounding
from pyft.ops.distributed import is_distributed
from pyft.ops.grad_norm import core_takes
from pyft.ops.library import LIBRARY, define
from pyft.ops.rules import NEVER_NEGATIVE, RULES, Rule, hyper_by_name

define(
    "update_(str rule, Tensor(a!)[] params, Tensor[] grads, str[] keys, Tensor(b!)[] state, Tensor[] steps, "
    "Tensor? clip_coef, float[] hyper, float decay_to_init, str weights, int seed, bool first) -> ()"
)

# The places of state in the core, in its order; a moment in 8 bits has a scale beside it.
SLOTS = ("first", "second", "third", "first_scale", "second_scale", "third_scale", "extra", "init", "step")
WEIGHTS = ("plain", "split32", "kahan", "stochastic")
EXTRA = {"split32": "remainder", "kahan": "compensation"}


def slots_of(rule: Rule, weights: str) -> dict[str, str]:
    """Key in the state of a parameter -> slot in the core, for all keys that this rule may have."""
    slots = {"step": "step", "init": "init"}
    if weights in EXTRA:
        slots[EXTRA[weights]] = "extra"
    for name, slot in zip(rule.moments, SLOTS, strict=False):
        if name is not None:
            slots.update({name: slot, f"{name}_q8": slot, f"{name}_scale": f"{slot}_scale"})
    return slots


@dataclass(frozen=True)
class Step:
    """What a step does to one parameter, beside its tensors.

    `numbers` are those of the rule, in its order; `scale` multiplies the gradient after it was clamped to
    [-clip_value, clip_value] and its rows were multiplied by `row_factors`, (rows,). `number` and `seed` key the
    random bits; `first` says that the moments were made for this step.
    """

    rule: Rule
    numbers: Sequence[float]
    decay_to_init: float = 0.0
    scale: float | Tensor = 1.0
    clip_value: float | None = None
    row_factors: Tensor | None = None
    weights: str = "plain"
    seed: int = 0
    number: int = 0
    first: bool = False


def _gradient(grad: Tensor, like: Tensor, step: Step, maximize: bool) -> Tensor:
    g = grad.detach().to(like.dtype)
    if step.clip_value is not None:
        g = g.clamp(-step.clip_value, step.clip_value)
    if step.row_factors is not None:
        factors = step.row_factors.to(device=g.device, dtype=g.dtype)
        g = g * (factors.reshape(()) if g.ndim <= 1 else factors.reshape(-1, *[1] * (g.ndim - 1)))
    scale = step.scale
    if isinstance(scale, Tensor):
        scale = scale.to(device=g.device, dtype=g.dtype)
    return g * (-scale if maximize else scale)


def _read_weights(param: Tensor, state: Mapping[str, Tensor], weights: str, wide: torch.dtype) -> Tensor:
    order = rounding.memory_order(param)
    flat = rounding.flat(param.detach(), order)
    if param.dtype != torch.bfloat16:
        return flat.to(wide)
    if weights == "split32":
        return rounding.join(flat, rounding.flat(state["remainder"], order))
    if weights == "kahan":
        return flat.to(wide) + rounding.flat(state["compensation"], order).to(wide)
    return flat.to(wide)


def _write_weights(param: Tensor, state: Mapping[str, Tensor], value: Tensor, step: Step, count: int) -> None:
    order = rounding.memory_order(param)

    def write(tensor: Tensor, flat: Tensor) -> None:
        rounding.write_flat(tensor, order, flat)

    if param.dtype != torch.bfloat16 or step.weights == "plain":
        write(param, value)
    elif step.weights == "split32":
        high, low = rounding.split(value)
        write(param, high)
        write(state["remainder"], low)
    elif step.weights == "kahan":
        rounded = value.to(torch.bfloat16)
        write(param, rounded)
        write(state["compensation"], value - rounded.to(value.dtype))
    else:
        key = rounding.random_key(step.seed, step.number, count) ^ 0xFFFFFFFF
        random = rounding.random_bits(key, value.numel(), value.device)
        write(param, rounding.to_bf16_stochastic(value, random >> 16))


def _read_moment(state: Mapping[str, Tensor], name: str, order: list[int], wide: torch.dtype) -> Tensor:
    if name in state:
        return rounding.flat(state[name], order).to(wide)
    return rounding.decode_int8(rounding.flat(state[f"{name}_q8"], order), state[f"{name}_scale"])


def _write_moment(
    state: Mapping[str, Tensor], name: str, order: list[int], value: Tensor, key: int, place: int
) -> None:
    kept = state.get(name)
    if kept is not None and (kept.dtype != torch.bfloat16 or value.dtype != torch.float32):
        rounding.write_flat(kept, order, value)
        return
    random = rounding.block_random_bits(key, place, value.numel(), value.device)
    if kept is None:
        codes, scale = rounding.encode_int8(value, random, name not in NEVER_NEGATIVE)
        rounding.write_flat(state[f"{name}_q8"], order, codes)
        state[f"{name}_scale"].copy_(scale)
    else:
        rounding.write_flat(kept, order, rounding.to_bf16_stochastic(value, random >> 16))


@torch.no_grad()
def update_reference_(param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: Step) -> None:
    """One parameter in PyTorch: any floating dtype, layout and device.

    On what the core takes it gives the same bits as the core.

    Args:
        param: any shape. Written.
        grad: same shape.
        state: its state tensors by name, `step` among them where the rule counts: the number of this step, from 1.
        step: what is done.
    """
    rule = step.rule
    if rule.factored:
        _factored_(param, grad, state, step)
        return
    hyper = hyper_by_name(rule, step.numbers)
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    count = int(state["step"]) if "step" in state else 1
    g = _gradient(grad, param.detach().to(wide), step, hyper["maximize"] != 0.0)
    order = rounding.memory_order(param)
    g = rounding.flat(g, order)
    p = _read_weights(param, state, step.weights, wide)
    pull = None
    if "init" in state and step.decay_to_init != 0.0:
        away = p - rounding.flat(state["init"], order).to(wide)
        if rule.decoupled_decay:
            pull = (hyper["lr"] * step.decay_to_init) * away
        else:
            g = g + step.decay_to_init * away
    moments = {name: _read_moment(state, name, order, wide) for name in rule.kept}
    value = rule.element(p, g, moments, hyper, float(count), step.first)
    if pull is not None:
        value = value - pull
    _write_weights(param, state, value, step, count)
    key = rounding.random_key(step.seed, step.number, count)
    for place, name in enumerate(rule.moments):
        if name is not None:
            _write_moment(state, name, order, moments[name], key, place)


def _factored_(param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: Step) -> None:
    hyper = hyper_by_name(step.rule, step.numbers)
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    if math.isnan(hyper["eps1"]):
        hyper["eps1"] = torch.finfo(param.dtype).eps
    count = int(state["step"])
    flat = _read_weights(param, state, step.weights, wide)
    order = rounding.memory_order(param)
    p = torch.empty_like(param, dtype=wide)
    rounding.write_flat(p, order, flat)
    g = _gradient(grad, p, step, hyper["maximize"] != 0.0)
    moments = {name: state[name].to(wide) for name in step.rule.kept if name in state}
    value = p if p.numel() == 0 else step.rule.element(p, g, moments, hyper, float(count), step.first)
    if "init" in state and step.decay_to_init != 0.0:
        value = value - (hyper["lr"] * step.decay_to_init) * (p - state["init"].to(wide))
    _write_weights(param, state, rounding.flat(value, order), step, count)
    for name, moment in moments.items():
        state[name].copy_(moment)


def _reference_kernel(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    keys: list[str],
    state: list[Tensor],
    steps: list[Tensor],
    clip_coef: Tensor | None,
    hyper: list[float],
    decay_to_init: float,
    weights: str,
    seed: int,
    first: bool,
) -> None:
    known = RULES[rule]
    names = {slot: key for key, slot in slots_of(known, weights).items() if not key.endswith("_q8")}
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        of_one: dict[str, Tensor] = {}
        for k, slot in enumerate(keys):
            tensor = state[k * len(params) + i]
            narrow = slot in SLOTS[:3] and tensor.dtype in (torch.int8, torch.uint8)
            of_one[f"{names[slot]}_q8" if narrow else names[slot]] = tensor
        if steps:
            of_one["step"] = steps[i]
        scale = 1.0 if clip_coef is None else clip_coef.reshape(())
        step = Step(known, hyper, decay_to_init, scale, None, None, weights, seed, i, first)
        update_reference_(param, grad, of_one, step)


def _fake(*args: object) -> None:
    return None


LIBRARY.impl("update_", _reference_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("pyft::update_", _fake, lib=LIBRARY)


def check_parameter(param: Tensor, name: str) -> None:
    """Refuse what no in-place update can be right for.

    Raises:
        TypeError: sparse, complex or integer, or spread over processes (DTensor), whose memory is not its own.
        ValueError: several elements share one place in memory (an expanded tensor).
    """
    if is_distributed(param):
        raise TypeError(
            f"{name} is a DTensor, as fully_shard makes them; give the to_local() of parameter, gradient and state, or "
            "use an optimizer of pyft.optim, which does"
        )
    if param.layout != torch.strided or not param.dtype.is_floating_point:
        kind = "sparse" if param.layout != torch.strided else str(param.dtype)
        raise TypeError(f"{name} must be a dense real floating tensor, got {kind}")
    if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"{name} has shape {tuple(param.shape)} and strides {param.stride()}: its elements share memory, so an "
            "in-place update is not defined; clone() the parameter first"
        )


def _check_list(name: str, params: Sequence[Tensor], others: Sequence[Tensor], shaped: bool) -> None:
    if len(others) != len(params):
        raise ValueError(f"{name} has {len(others)} tensors but params has {len(params)}")
    for i, (param, other) in enumerate(zip(params, others, strict=True)):
        if other.layout != torch.strided:
            raise TypeError(f"{name}[{i}] is sparse; only dense tensors are taken (sparse: torch.optim.SparseAdam)")
        if name == "steps" and other.numel() != 1:
            raise ValueError(f"{name}[{i}] must hold one number, got shape {tuple(other.shape)}")
        if shaped and other.shape != param.shape:
            raise ValueError(
                f"{name}[{i}] must have the shape of params[{i}] {tuple(param.shape)}, got {tuple(other.shape)}"
            )
        if name == "grads" and not other.dtype.is_floating_point:
            raise ValueError(f"{name}[{i}] must be floating, got {other.dtype}")


def _check(params: Sequence[Tensor], grads: Sequence[Tensor], state: Mapping[str, Sequence[Tensor]]) -> None:
    for i, param in enumerate(params):
        check_parameter(param, f"params[{i}]")
    _check_list("grads", params, grads, shaped=True)
    for key, tensors in state.items():
        _check_list(key, params, tensors, shaped=not key.endswith("_scale") and key != "steps")


def fits_core(param: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether the compiled core takes a parameter with this state."""
    if not core_takes(param):
        return False
    for key, tensor in state.items():
        if tensor.device != param.device:
            return False
        if key == "step":
            if tensor.dtype != torch.float32:
                return False
        elif key.endswith("_scale"):
            if not tensor.is_contiguous():
                return False
        elif tensor.stride() != param.stride() or tensor.dtype in (torch.float64, torch.float16):
            return False
    return True


def update_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    hyper: Mapping[str, float],
    clip_coef: Tensor | None = None,
    *,
    decay_to_init: float = 0.0,
    weights: str = "plain",
    seed: int = 0,
    first: bool = False,
) -> None:
    """One step of an optimizer rule on all tensors, in place.

    Args:
        rule: adamw, adam (each also with _amsgrad), sgd, sgd_momentum, sgd_nesterov, rmsprop (also with _centered,
            _momentum, _centered_momentum), adagrad or lion.
        params: floating tensors of any shape and layout, without overlapping memory. Written.
        grads: one for each parameter, same shape, any layout. Read only.
        state: state tensors by torch.optim's names, one list each, for instance exp_avg; in bf16 or fp32, or NAME_q8
            with NAME_scale. `step` holds one-element tensors, the number of this step from 1: read only. `remainder`,
            `compensation` and `init` as in `pyft.optim`. Written.
        hyper: the numbers of the rule by name: lr, weight_decay, maximize and what else it has.
        clip_coef: () factor for all gradients, or None for 1.
        decay_to_init: pull toward `init` (L2-SP, Li et al. 2018).
        weights: plain, split32, kahan or stochastic: how bf16 parameters are rounded.
        seed: of stochastic rounding.
        first: the moments were made for this step (SGD then takes the whole gradient, without dampening).

    Raises:
        ValueError, TypeError: the rule, its numbers, or lengths, shapes and dtypes do not fit. Nothing is written.

    >>> p = torch.tensor([1.0])
    >>> update_("sgd", [p], [torch.tensor([2.0])], {}, {"lr": 0.25})
    >>> p
    tensor([0.5000])
    """
    from pyft.core.loader import load_core_for

    if rule not in RULES or RULES[rule].factored:
        known_rules = ", ".join(name for name in RULES if not RULES[name].factored)
        raise ValueError(f"rule must be one of {known_rules}, got '{rule}'")
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got '{weights}'")
    known = RULES[rule]
    unknown = [name for name in hyper if name not in known.hyper]
    if unknown or "lr" not in hyper:
        raise ValueError(
            f"hyper of {rule} takes {', '.join(known.hyper)}, with lr; got {', '.join(hyper) or 'nothing'}"
        )
    numbers = [float(hyper.get(name, 0.0)) for name in known.hyper]
    _check(params, grads, {("steps" if key == "step" else key): tensors for key, tensors in state.items()})
    slots = slots_of(known, weights)
    missing = [name for name in known.kept if name not in state and f"{name}_q8" not in state]
    if missing or any(key not in slots for key in state):
        raise ValueError(
            f"state of {rule} needs {', '.join(known.kept) or 'nothing'}, got {', '.join(state) or 'nothing'}"
        )
    keys = [key for key in state if key != "step"]
    fast: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        of_one = {key: tensors[i] for key, tensors in state.items()}
        same_device = grads[i].device == param.device and grads[i].dtype != torch.float64
        with_core = torch.compiler.is_compiling() or load_core_for(param.device.type) is not None
        if with_core and fits_core(param, of_one) and same_device:
            fast.setdefault(param.device, []).append(i)
            continue
        scale = 1.0 if clip_coef is None else clip_coef.reshape(())
        step = Step(known, numbers, decay_to_init, scale, None, None, weights, seed, i, first)
        update_reference_(param, grads[i], of_one, step)
    for device, chosen in fast.items():
        written = [[state[key][i] for i in chosen] for key in keys]
        with torch.no_grad():
            torch.ops.pyft.update_(
                rule,
                [params[i] for i in chosen],
                [in_layout_of(params[i], grads[i]) for i in chosen],
                [slots[key] for key in keys],
                [tensor for tensors in written for tensor in tensors],
                [state["step"][i] for i in chosen] if "step" in state else [],
                None if clip_coef is None else clip_coef.to(device=device, dtype=torch.float32).reshape(()),
                numbers,
                decay_to_init,
                weights,
                seed,
                first,
            )
        # Raw writes are unseen by autograd: without this a saved, now stale value is used in silence.
        for tensors in ([params[i] for i in chosen], *written):
            torch.autograd.graph.increment_version(tensors)


def in_layout_of(param: Tensor, grad: Tensor) -> Tensor:
    """`grad` itself if its strides are the parameter's, else a copy with those strides."""
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param, requires_grad=False, dtype=grad.dtype).copy_(grad)
