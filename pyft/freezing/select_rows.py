"""Which rows of a weight are worth training: measured on a few batches, without a trace on the model."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyft.errors import ConfigError
from pyft.freezing.entries import Entries
from pyft.freezing.no_trace import no_trace
from pyft.freezing.partial_modules import PLAIN
from pyft.freezing.parts import bring_up_to_date, layers_with_parts

POLICIES = ("gradient", "fisher", "magnitude", "random")
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Rows:
    """A share of the rows of each weight that is named in `pyft.freeze(model, {...})`.

    A row is what stands for one output: an output feature of a Linear layer, an output channel of a convolution, a
    token of an Embedding, one entry of a bias or of a norm's weight. Of equal rows the first ones are taken.

    Attributes:
        fraction: share of the rows, in (0, 1]; at least one row is taken.
        count: their number instead; a weight with fewer rows trains whole.
        by: "gradient": largest L2 norm of the row's gradient, added up over the batches (as S2FT and SMT choose, Yang
            et al. 2024, He et al. 2024); "fisher": largest mean over the batches of the squared gradient, summed over
            the row (the diagonal of the empirical Fisher information, a batch as one sample; Sung et al. 2021);
            "magnitude": largest L2 norm of the row itself; "random".
        seed: of "random"; each weight draws by its own name.

    Raises:
        ConfigError: neither or both of fraction and count, one out of range, or an unknown policy.

    >>> Rows(0.1)
    Rows(fraction=0.1, count=None, by='gradient', seed=0)
    """

    fraction: float | None = None
    count: int | None = None
    by: Literal["gradient", "fisher", "magnitude", "random"] = "gradient"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.count is None):
            raise ConfigError(f"Rows: give fraction= or count=, one of them (got {self.fraction} and {self.count})")
        if self.fraction is not None and not (_is_number(self.fraction) and 0.0 < self.fraction <= 1.0):
            raise ConfigError(f"Rows: fraction={self.fraction!r}: a share above 0, 1 at most, is expected")
        if self.count is not None and not (_is_number(self.count) and self.count == int(self.count) >= 1):
            raise ConfigError(f"Rows: count={self.count!r}: a whole number, 1 at least, is expected")
        if self.by not in POLICIES:
            raise ConfigError(f"Rows: by={self.by!r}: expected one of {', '.join(POLICIES)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"Rows: seed={self.seed!r}: a whole number is expected")

    @property
    def needs_batches(self) -> bool:
        """Whether the policy looks at gradients."""
        return self.by in ("gradient", "fisher")

    def number(self, rows: int) -> int:
        """How many of `rows` train."""
        wanted = int(self.count) if self.count is not None else round(rows * float(self.fraction or 0))
        return min(rows, max(1, wanted))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The part of a weight that trains, and why.

    Attributes:
        entries: which entries.
        reason: in words; "" where the caller named them.
        share: of what the policy measures (squared norms, Fisher information), how much lies in these rows, 0 to 1;
            None where nothing was measured.
    """

    entries: Entries
    reason: str = ""
    share: float | None = None


def choose_rows(
    model: nn.Module,
    wishes: Mapping[str, tuple[nn.Parameter, Rows]],
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> dict[str, Chosen]:
    """The rows of each weight. The model is measured in eval mode, whole, and left exactly as it was.

    Args:
        wishes: by name, the weight (rows, ...) and its share.
        batches: pairs (inputs, targets), objects with these attributes, or dicts of keyword arguments for a model that
            gives `.loss`; needed by "gradient" and "fisher". All are looked at.
        loss: (outputs, targets) -> (), the mean over the batch; None for a model that gives `.loss`.

    Raises:
        ConfigError: no batches where they are needed, a weight that the loss does not reach, or NaN or inf.
    """
    measured = {name: wish for name, wish in wishes.items() if wish[1].needs_batches}
    scores: dict[str, Tensor] = {}
    seen = 0
    if measured:
        scores, seen = _gradient_scores(model, measured, batches, loss)
    chosen = {}
    for name, (parameter, rows) in wishes.items():
        size = parameter.shape[0]
        count = rows.number(size)
        if rows.by == "random":
            order = torch.randperm(size, generator=_generator(rows.seed, name))
            chosen[name] = _made(parameter, order[:count], "at random")
            continue
        score = scores[name] if name in scores else _sums(parameter.detach().double().square())
        if not bool(torch.isfinite(score).all()):
            raise ConfigError(f"freeze: '{name}': its {rows.by} is NaN or inf, so no rows can be chosen by it")
        picked = torch.sort(score, descending=True, stable=True).indices[:count]
        total = float(score.sum())
        share = float(score[picked].sum()) / total if total > 0 else None
        over = f" over {seen} batch{'es' * (seen != 1)}" if name in scores else ""
        chosen[name] = _made(parameter, picked, f"largest {rows.by}{over}", share)
    return chosen


def draft_rows(wishes: Mapping[str, tuple[nn.Parameter, Rows]]) -> dict[str, Chosen]:
    """As many rows as would be chosen, for a plan that is only printed."""
    return {
        name: _made(parameter, torch.arange(rows.number(parameter.shape[0])), f"to be chosen by {rows.by}")
        for name, (parameter, rows) in wishes.items()
    }


def _made(parameter: nn.Parameter, rows: Tensor, reason: str, share: float | None = None) -> Chosen:
    return Chosen(Entries(tuple(parameter.shape), rows.cpu().sort().values), reason, share)


def _generator(seed: int, name: str) -> torch.Generator:
    """Depends on seed and name, not on what else is drawn."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)


def _sums(squares: Tensor) -> Tensor:
    """(rows,) sums of each row."""
    return squares if squares.ndim == 1 else squares.flatten(1).sum(1)


def _gradient_scores(
    model: nn.Module,
    measured: Mapping[str, tuple[nn.Parameter, Rows]],
    batches: Iterable[Any] | None,
    loss: Loss | None,
) -> tuple[dict[str, Tensor], int]:
    """(rows,) float64 by name, and the number of batches."""
    if batches is None:
        name, (_, rows) = next(iter(measured.items()))
        raise ConfigError(
            f"freeze: rows of '{name}' are to be chosen by {rows.by}: give batches= and loss=, or "
            "Rows(..., by='magnitude') or by='random', which look at no data"
        )
    parameters = {name: parameter for name, (parameter, _) in measured.items()}
    by = {name: rows.by for name, (_, rows) in measured.items()}
    total: dict[str, Tensor] = {}
    seen = 0
    with untouched(model):
        for module in model.modules():
            module.training = False  # not model.eval(): frozen modules note what was asked for last
        for other in model.parameters():
            other.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in batches:
            value = _loss_of(model, batch, loss)
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is None:
                    raise ConfigError(
                        f"freeze: the loss does not depend on '{name}', so its rows cannot be chosen by {by[name]}: "
                        "leave it out, or name it with by='magnitude'"
                    )
                term = gradient if by[name] == "gradient" else _sums(gradient.double().square())
                total[name] = total[name] + term if name in total else term
            seen += 1
    if not seen:
        raise ConfigError("freeze: batches= gave no batch to choose rows by: give at least one")
    scores = {
        name: (term / seen if by[name] == "fisher" else _sums(term.double().square())).cpu()
        for name, term in total.items()
    }
    return scores, seen


def _loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    inputs, targets = batch, None
    if hasattr(batch, "inputs") and hasattr(batch, "targets"):
        inputs, targets = batch.inputs, batch.targets
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
    elif not isinstance(batch, Mapping):
        raise ConfigError(
            f"freeze: batches= holds {type(batch).__name__}: (inputs, targets), or a dict of the model's keyword "
            "arguments, is expected"
        )
    with torch.enable_grad():
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        value = getattr(outputs, "loss", None) if loss is None else loss(outputs, targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = "loss= gave" if loss is not None else "the model gives no .loss, and loss= is missing; it gave"
        kind = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"freeze: {what} {kind}: loss=(outputs, targets) -> one number is expected")
    if not value.requires_grad:
        raise ConfigError("freeze: the loss depends on none of the weights whose rows are to be chosen")
    return value.reshape(())


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, layers that train in part are plain; gradients, flags, modes, buffers and random state come back."""
    bring_up_to_date(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    forms = [(layer, type(layer)) for layer in layers_with_parts(model)]
    with no_trace(model):
        try:
            for layer, form in forms:
                layer.__class__ = PLAIN[form]
            yield
        finally:
            for layer, form in forms:
                layer.__class__ = form
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
