"""The optimizer rules in PyTorch: formulas of csrc/*_math.h, rounded in the same places. Tensors are flat and wide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# State tensors that are never negative; in 8 bits they are kept as uint8.
NEVER_NEGATIVE = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})


@dataclass(frozen=True)
class Rule:
    """One optimizer rule.

    Attributes:
        name: as in csrc/update_rules.h.
        moments: names of the first, second and third moment; None for one that the rule does not have.
        hyper: names of its numbers, in the order in which the core takes them.
        element: the formula: (param, scaled gradient, moments by name, hyper by name, step, first) -> new parameter;
            moments are replaced in the dict.
        decoupled_decay: weight decay acts on the parameter, not through the gradient.
        counts: keeps a step counter.
        factored: `element` takes tensors in their own shape, and has no kernel in the core.
    """

    name: str
    moments: tuple[str | None, str | None, str | None]
    hyper: tuple[str, ...]
    element: Callable[[Tensor, Tensor, dict[str, Tensor], dict[str, float], float, bool], Tensor]
    decoupled_decay: bool = False
    counts: bool = True
    factored: bool = False

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the moments that it has."""
        return tuple(name for name in self.moments if name is not None)


def _root(x: Tensor) -> Tensor:
    # torch's fp32 sqrt may go to a vector library that does not round correctly; through float64 it is exact.
    return x.to(torch.float64).sqrt().to(x.dtype)


def _adam(coupled: bool, amsgrad: bool) -> Callable[..., Tensor]:
    def element(
        p: Tensor, g: Tensor, moments: dict[str, Tensor], h: dict[str, float], step: float, first: bool
    ) -> Tensor:
        if coupled:
            g = g + h["weight_decay"] * p
        m, v = moments["exp_avg"], moments["exp_avg_sq"]
        m = m + (g - m) * (1.0 - h["beta1"])
        v = v * h["beta2"] + (g * g) * (1.0 - h["beta2"])
        second = v
        if amsgrad:
            largest = moments["max_exp_avg_sq"]
            second = moments["max_exp_avg_sq"] = torch.where(largest > v, largest, v)
        moments.update(exp_avg=m, exp_avg_sq=v)
        step_size = h["lr"] / (1.0 - h["beta1"] ** step)
        inv_sqrt_bias_correction2 = 1.0 / math.sqrt(1.0 - h["beta2"] ** step)
        denom = _root(second) * inv_sqrt_bias_correction2 + h["eps"]
        kept = p if coupled else p * (1.0 - h["lr"] * h["weight_decay"])
        return kept - step_size * (m / denom)

    return element


def _sgd(momentum: bool, nesterov: bool) -> Callable[..., Tensor]:
    def element(
        p: Tensor, g: Tensor, moments: dict[str, Tensor], h: dict[str, float], step: float, first: bool
    ) -> Tensor:
        g = g + h["weight_decay"] * p
        if momentum:
            taken = 1.0 if first else 1.0 - h["dampening"]
            velocity = moments["momentum_buffer"] * h["momentum"] + g * taken
            moments["momentum_buffer"] = velocity
            g = g + h["momentum"] * velocity if nesterov else velocity
        return p - h["lr"] * g

    return element


def _rmsprop(centered: bool, momentum: bool) -> Callable[..., Tensor]:
    def element(
        p: Tensor, g: Tensor, moments: dict[str, Tensor], h: dict[str, float], step: float, first: bool
    ) -> Tensor:
        g = g + h["weight_decay"] * p
        v = moments["square_avg"] * h["alpha"] + (g * g) * (1.0 - h["alpha"])
        moments["square_avg"] = variance = v
        if centered:
            mean = moments["grad_avg"]
            mean = moments["grad_avg"] = mean + (g - mean) * (1.0 - h["alpha"])
            variance = v - mean * mean
            variance = torch.where(variance < 0.0, 0.0, variance)
        update = g / (_root(variance) + h["eps"])
        if momentum:
            update = moments["momentum_buffer"] = moments["momentum_buffer"] * h["momentum"] + update
        return p - h["lr"] * update

    return element


def _adagrad(p: Tensor, g: Tensor, moments: dict[str, Tensor], h: dict[str, float], step: float, first: bool) -> Tensor:
    g = g + h["weight_decay"] * p
    total = moments["sum"] = moments["sum"] + g * g
    return p - (h["lr"] / (1.0 + (step - 1.0) * h["lr_decay"])) * (g / (_root(total) + h["eps"]))


def _lion(p: Tensor, g: Tensor, moments: dict[str, Tensor], h: dict[str, float], step: float, first: bool) -> Tensor:
    m = moments["exp_avg"]
    change = g - m
    c = m + change * (1.0 - h["beta1"])
    moments["exp_avg"] = m + change * (1.0 - h["beta2"])
    sign = (c > 0).to(c.dtype) - (c < 0).to(c.dtype) + c * 0.0
    return p * (1.0 - h["lr"] * h["weight_decay"]) - h["lr"] * sign


def _adafactor(
    p: Tensor, g: Tensor, moments: dict[str, Tensor], h: dict[str, float], step: float, first: bool
) -> Tensor:
    """torch.optim.Adafactor's variant of Shazeer and Stern, ICML 2018, algorithm 4: weights of the average are
    1 - step^beta2_decay, eps1 bounds the estimate from below instead of being added to the square."""
    taken = step ** h["beta2_decay"]
    rho = min(h["lr"], 1.0 / math.sqrt(step))
    size = max(p.numel(), 1)
    alpha = max(h["eps2"], float(p.norm(2)) / math.sqrt(size)) * rho
    p = p * (1.0 - h["lr"] * h["weight_decay"]) if h["weight_decay"] != 0.0 else p
    if "variance" in moments:
        moments["variance"] = moments["variance"] + (g * g - moments["variance"]) * taken
        estimate = moments["variance"]
    else:
        for name, dim in (("row_var", -1), ("col_var", -2)):
            mean = g.norm(dim=dim, keepdim=True).square() / g.size(dim)
            moments[name] = moments[name] + (mean - moments[name]) * taken
        row, col = moments["row_var"], moments["col_var"]
        estimate = (row @ col) / row.mean(dim=-2, keepdim=True).clamp(min=h["eps1"])
    update = estimate.clamp(min=h["eps1"] * h["eps1"]).rsqrt() * g
    denom = max(1.0, float(update.norm(2)) / (math.sqrt(size) * h["d"]))
    return p - (alpha / denom) * update


_ADAM = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
_SGD = ("lr", "momentum", "dampening", "weight_decay", "maximize")
_RMSPROP = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")
_MOMENTS = ("exp_avg", "exp_avg_sq", None)
_AMSGRAD = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_BUFFER = ("momentum_buffer", None, None)

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("adamw", _MOMENTS, _ADAM, _adam(False, False), decoupled_decay=True),
        Rule("adamw_amsgrad", _AMSGRAD, _ADAM, _adam(False, True), decoupled_decay=True),
        Rule("adam", _MOMENTS, _ADAM, _adam(True, False)),
        Rule("adam_amsgrad", _AMSGRAD, _ADAM, _adam(True, True)),
        Rule("sgd", (None, None, None), _SGD, _sgd(False, False), counts=False),
        Rule("sgd_momentum", _BUFFER, _SGD, _sgd(True, False), counts=False),
        Rule("sgd_nesterov", _BUFFER, _SGD, _sgd(True, True), counts=False),
        Rule("rmsprop", ("square_avg", None, None), _RMSPROP, _rmsprop(False, False)),
        Rule("rmsprop_centered", ("square_avg", None, "grad_avg"), _RMSPROP, _rmsprop(True, False)),
        Rule("rmsprop_momentum", ("square_avg", "momentum_buffer", None), _RMSPROP, _rmsprop(False, True)),
        Rule(
            "rmsprop_centered_momentum", ("square_avg", "momentum_buffer", "grad_avg"), _RMSPROP, _rmsprop(True, True)
        ),
        Rule("adagrad", ("sum", None, None), ("lr", "lr_decay", "eps", "weight_decay", "maximize"), _adagrad),
        Rule(
            "lion",
            ("exp_avg", None, None),
            ("lr", "beta1", "beta2", "weight_decay", "maximize"),
            _lion,
            decoupled_decay=True,
        ),
        Rule(
            "adafactor",
            ("row_var", "col_var", "variance"),
            ("lr", "beta2_decay", "eps1", "eps2", "d", "weight_decay", "maximize"),
            _adafactor,
            decoupled_decay=True,
            factored=True,
        ),
    )
}


def hyper_by_name(rule: Rule, numbers: Sequence[float]) -> dict[str, float]:
    """The numbers of a rule by name."""
    return dict(zip(rule.hyper, numbers, strict=True))
