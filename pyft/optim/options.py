"""What every optimizer of pyft takes beside its own hyperparameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch

if TYPE_CHECKING:
    from pyft.optim.backward import BackwardNorms

ClipMode = Literal["global", "group", "tensor", "agc"]
CLIP_MODES = ("global", "group", "tensor", "agc")
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
INIT_DTYPES = ("float32", "bfloat16")
WEIGHTS = ("plain", "split32", "kahan", "stochastic")


class StepOptions(TypedDict, total=False):
    """Keywords of every optimizer in `pyft.optim`.

    Where all parameters are on GPUs and the CUDA core is there, a step waits for nothing and can be captured in a CUDA
    graph (`refresh_graph`, docs/cuda.md): norms, clip factors, step counters and the decision about NaN stay on the
    GPU, in one launch, or three where norms are taken. With several GPUs the norm is that over all of them, for one
    small copy from each to each. Parameters on CPU and GPU together, float64 ones, or rows of "agc" that are no runs of
    memory, make all of them run in PyTorch. Parameters may be DTensors, spread over processes by `fully_shard`:
    docs/distributed.md.

    Attributes:
        clip_norm: limit of `clip_mode`, or limits of several modes by name, for instance {"agc": 0.01, "global": 1.0}:
            one of "tensor" and "agc", and one of "group" and "global". Default: None.
        clip_mode: what one number in `clip_norm` means. "global": the norm of all gradients; "group": of each
            parameter group; "tensor": of each gradient; all by torch's factor min(1, limit / (norm + 1e-6)). "agc":
            each row to at most limit * max(norm of the row of weights, 1e-3), Brock et al. 2021, eq. 3; a row is an
            entry of the first dimension, a tensor of one dimension is one row. Default: "global".
        clip_value: gradients are clamped to [-clip_value, clip_value]. Default: None. The order is value, then tensor
            or agc, then group or global. `p.grad` itself is never changed.
        on_nonfinite: "skip" a step whose gradients hold NaN or inf, "raise" NonFiniteError, or "ignore" it (then a norm
            that is not finite scales nothing). Looked at before anything is written. Default: None, "raise" where a
            norm is taken anyway, else "ignore", without an extra pass over the gradients. On a GPU "raise" waits for
            every step to read one flag, so None there means "skip" where a norm is taken anyway: look at
            `last_step.skipped`, or ask for "raise".
        decay_to_init: decay toward the value of the parameter at its first step (L2-SP, Li et al. 2018; on a GPU the
            first that was tried, even if skipped), decoupled where weight decay is; a group may have its own.
            Default: 0.0.
        init_dtype: in what that value is kept: "float32" or "bfloat16". Default: "float32".
        grads: "free" sets `p.grad` to None and gives its memory back as soon as it is used. Default: "keep".
        state_dtype: of the moments: "float32", "bfloat16" or "int8" (one byte an element and a float32 for each 256;
            state keys NAME_q8 and NAME_scale). The narrow ones are rounded stochastically, or slow averages would
            stick. Moments of float64 parameters are float64. Default: "float32".
        weights: of bfloat16 parameters. "plain"; "split32": with 16 more bits in the state, exactly as a float32
            master; "kahan": with a bfloat16 compensation; "stochastic": rounded at random. Default: "plain".
        step_in_backward: each parameter is updated in backward, as soon as its gradient is there, and the gradient
            freed. Every backward is a step: not for accumulation, GradScaler or DistributedDataParallel.
            Default: False.
        norm_in_backward: True, or what `pyft.optim.norm_in_backward` gave: norms are taken in backward, while
            gradients are in the cache. Parameters on a GPU are passed over; not for DistributedDataParallel.
            Default: False.
        seed: of all stochastic rounding. Default: 0.
    """

    clip_norm: float | Mapping[str, float] | None
    clip_mode: ClipMode
    clip_value: float | None
    on_nonfinite: Literal["skip", "raise", "ignore"] | None
    decay_to_init: float
    init_dtype: Literal["float32", "bfloat16"]
    grads: Literal["keep", "free"]
    state_dtype: Literal["float32", "bfloat16", "int8"]
    weights: Literal["plain", "split32", "kahan", "stochastic"]
    step_in_backward: bool
    norm_in_backward: bool | BackwardNorms
    seed: int


@dataclass(frozen=True)
class Limits:
    """Limits of clipping by norm; None: no such clipping."""

    agc: float | None = None
    tensor: float | None = None
    group: float | None = None
    global_: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return any(limit is not None for limit in (self.agc, self.tensor, self.group, self.global_))

    @property
    def only_global(self) -> bool:
        """Whether all gradients have one factor."""
        return self.agc is None and self.tensor is None and self.group is None


@dataclass(frozen=True)
class Settings:
    """`StepOptions`, checked."""

    limits: Limits = field(default_factory=Limits)
    clip_value: float | None = None
    on_nonfinite: str | None = None
    grads: str = "keep"
    state_dtype: str = "float32"
    weights: str = "plain"
    init_dtype: str = "float32"
    step_in_backward: bool = False
    seed: int = 0

    @property
    def policy(self) -> str:
        """What is done about NaN and inf: "skip", "raise" or "ignore"."""
        return self.on_nonfinite or ("raise" if self.limits.any else "ignore")

    @property
    def takes_norm(self) -> bool:
        """Whether a step reads the gradients before it updates."""
        return self.limits.any or self.policy != "ignore"


def _one_of(name: str, value: Any, allowed: Any) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0.0:
        raise ValueError(f"{name} must be above 0 or None, got {value!r}")
    return float(value)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits, got {value!r}")
    return value


def _limits(clip_norm: float | Mapping[str, float] | None, clip_mode: str) -> Limits:
    _one_of("clip_mode", clip_mode, CLIP_MODES)
    if clip_norm is None:
        return Limits()
    by_mode = dict(clip_norm) if isinstance(clip_norm, Mapping) else {clip_mode: clip_norm}
    for mode, limit in by_mode.items():
        _one_of("a key of clip_norm", mode, CLIP_MODES)
        by_mode[mode] = _above_zero("clip_norm" if len(by_mode) == 1 else f"clip_norm['{mode}']", limit)
    for pair in (("tensor", "agc"), ("group", "global")):
        if set(pair) <= set(by_mode):
            raise ValueError(f"clip_norm takes one of '{pair[0]}' and '{pair[1]}', got both")
    if by_mode.get("agc") is not None and math.isinf(by_mode["agc"]):
        del by_mode["agc"]
    return Limits(by_mode.get("agc"), by_mode.get("tensor"), by_mode.get("group"), by_mode.get("global"))


def checked(options: Mapping[str, Any], owner: str) -> Settings:
    """The settings of an optimizer from its keywords, without `decay_to_init` and `norm_in_backward`.

    Raises:
        TypeError: an unknown keyword.
        ValueError: a value out of range, or values that exclude each other.
    """
    unknown = [name for name in options if name not in StepOptions.__annotations__]
    if unknown:
        raise TypeError(f"{owner} got an unexpected keyword argument '{unknown[0]}'")
    limits = _limits(options.get("clip_norm"), options.get("clip_mode", "global"))
    value = options.get("clip_value")
    policy = options.get("on_nonfinite")
    in_backward = bool(options.get("step_in_backward", False))
    if in_backward and (limits.global_ is not None or limits.group is not None):
        mode = "global" if limits.global_ is not None else "group"
        raise ValueError(
            f"step_in_backward=True cannot clip by the '{mode}' norm: a parameter is updated before the other "
            "gradients are known. Use clip_mode='tensor' or 'agc', or clip_value, or step_in_backward=False"
        )
    if in_backward and options.get("norm_in_backward"):
        raise ValueError("norm_in_backward has no use with step_in_backward=True; leave one of them off")
    return Settings(
        limits=limits,
        clip_value=None if value is None else _above_zero("clip_value", value),
        on_nonfinite=None if policy is None else _one_of("on_nonfinite", policy, ("skip", "raise", "ignore")),
        grads=_one_of("grads", options.get("grads", "keep"), ("keep", "free")),
        state_dtype=_one_of("state_dtype", options.get("state_dtype", "float32"), STATE_DTYPES),
        weights=_one_of("weights", options.get("weights", "plain"), WEIGHTS),
        init_dtype=_one_of("init_dtype", options.get("init_dtype", "float32"), INIT_DTYPES),
        step_in_backward=in_backward,
        seed=_seed(options.get("seed", 0)),
    )


def check_capturable(owner: str, params: Iterable[torch.Tensor]) -> None:
    """For torch's `capturable=True`.

    Raises:
        ValueError: a parameter is on the CPU, where no graph is captured.
    """
    if not all(param.is_cuda for param in params):
        raise ValueError(f"{owner} does not support capturable=True on the CPU; leave it off: on a GPU every step is")


def check_switches(owner: str, **switches: bool | None) -> None:
    """torch's keywords for its own implementations.

    Raises:
        ValueError: `differentiable` is set, which changes what a step may do.
    """
    if switches.pop("differentiable", False):
        raise ValueError(f"{owner} does not support differentiable=True; use torch.optim.{owner}")
    chosen = [f"{name}=True" for name, value in switches.items() if value]
    if chosen:
        warnings.warn(
            f"pyft.optim.{owner}: {', '.join(chosen)} is ignored: there is one implementation, for all tensors at once",
            UserWarning,
            stacklevel=3,
        )
