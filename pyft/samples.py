"""Plain types that data, models, training, evaluation and export share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["text", "image", "array"]
Problem = Literal["classification", "multilabel", "regression"]


@dataclass(frozen=True)
class Samples:
    """A set of samples, not yet turned into batches.

    Attributes:
        kind: what `inputs` holds: "text" (list of str), "image" (list of Path or PIL image),
            "array" (Tensor of shape (N, ...), `TableRows`, or an indexable Dataset giving Tensors).
        inputs: N raw samples, indexable by int.
        targets: (N,) int64 class index; (N,) or (N, K) float32 for regression; (N, C) float32 of 0 and 1
            for multilabel; None where there are no labels (prediction).
        name: where they came from, for messages ("train.tsv", "X").
        columns: names of the features where `inputs` are columns of a table; None else.
    """

    kind: Kind
    inputs: Sequence[Any] | torch.Tensor
    targets: torch.Tensor | None
    name: str = "data"
    columns: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, index: Sequence[int] | torch.Tensor) -> Samples:
        """The samples of the given numbers, in that order."""
        import torch

        numbers = torch.as_tensor(index, dtype=torch.int64)
        if isinstance(self.inputs, torch.Tensor):
            inputs: Any = self.inputs[numbers]
        elif isinstance(self.inputs, list):
            inputs = [self.inputs[i] for i in numbers.tolist()]
        elif hasattr(self.inputs, "take"):
            inputs = self.inputs.take(numbers.numpy())
        else:
            inputs = torch.utils.data.Subset(self.inputs, numbers.tolist())  # type: ignore[arg-type]
        return replace(self, inputs=inputs, targets=None if self.targets is None else self.targets[numbers])


@dataclass(frozen=True)
class Data:
    """Training, validation and test samples with one meaning of the labels.

    Attributes:
        classes: label names in the order of the class index; None for regression.
        fingerprint: SHA-256 over samples, labels and split; a resumed run checks it.
        source: a path or description from which the data can be read again, or None for in-memory data.
        notes: lines worth telling the user (dropped rows, an imbalance, ...).
    """

    train: Samples
    val: Samples | None
    test: Samples | None
    kind: Kind
    problem: Problem
    classes: list[str] | None
    fingerprint: str
    source: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """The batch that the samples of one of several processes are of.

    Attributes:
        targets: of the whole batch.
        counts: whether these samples are this process's; else another has them, and the loss is 0.
    """

    targets: torch.Tensor | None
    counts: bool = True


@dataclass(frozen=True)
class Batch:
    """What one step takes.

    Attributes:
        inputs: Tensor (B, ...) or dict of Tensors, given to the model as `model(x)` or `model(**x)`.
        targets: as in `Samples`, first dimension B; None for prediction.
        index: (B,) int64 sample numbers within the `Samples`.
        share: where these samples are one process's share of a batch; None: they are the batch.
    """

    inputs: torch.Tensor | dict[str, torch.Tensor]
    targets: torch.Tensor | None
    index: torch.Tensor
    share: Share | None = None
