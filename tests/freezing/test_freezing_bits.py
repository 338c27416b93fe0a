"""Frozen means bit-identical: every change is seen and named, nothing else is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pyft.errors import ConfigError, FrozenError
from pyft.freezing.fingerprint import fingerprint
from pyft.freezing.plan import freeze, make_plan


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def flip(tensor: torch.Tensor, bit: int) -> None:
    flat = tensor.detach().view(-1).view(torch.uint8)
    flat[bit // 8] ^= 1 << (bit % 8)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked"])
@pytest.mark.parametrize("bit", [0, 23, -1])
def test_one_flipped_bit_is_found_and_named(name: str, bit: int) -> None:
    model = net()
    plan = freeze(model, ["0", "1"])
    plan.verify(model)
    tensor = model.state_dict(keep_vars=True)[name]
    position = bit % (8 * tensor.nbytes)
    flip(tensor, position)
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    with pytest.raises(FrozenError, match=rf"{kind} '{name}' was to stay frozen, but its values have changed\."):
        plan.verify(model)
    flip(tensor, position)
    plan.verify(model)


def test_every_single_bit_counts() -> None:
    tensor = torch.randn(5)
    prints = {fingerprint(tensor)}
    for bit in range(8 * tensor.nbytes):
        other = tensor.clone()
        flip(other, bit)
        prints.add(fingerprint(other))
    assert len(prints) == 1 + 8 * tensor.nbytes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(0), torch.zeros(0, 1)),
        (torch.tensor(1), torch.tensor(2)),
        (torch.tensor([1.0 + 2.0j]), torch.tensor([1.0 - 2.0j])),
        (torch.tensor([True]), torch.tensor([False])),
    ],
)
def test_tensors_that_differ(one: torch.Tensor, other: torch.Tensor) -> None:
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one.clone())


def test_nan_is_compared_by_its_bits() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    plan = freeze(model, "0")
    plan.verify(model)
    flip(model[0].weight, 3)  # still NaN, another payload
    assert model[0].weight.isnan().sum() == 1
    with pytest.raises(FrozenError, match=r"'0\.weight'"):
        plan.verify(model)


def test_memory_format_and_lazy_conjugation_do_not_count() -> None:
    model = net()
    plan = freeze(model, ["0", "1"])
    model.to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    plan.verify(model)
    assert fingerprint(torch.arange(6.0)[::2]) == fingerprint(torch.tensor([0.0, 2.0, 4.0]))
    x = torch.randn(3, dtype=torch.complex64)
    assert fingerprint(x.conj()) == fingerprint(x.conj().resolve_conj())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.double(), r"'0\.weight' .* its dtype is float64, it was float32 \(5 more like it\)"),
        (lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(1))), "its shape is"),
        (lambda model: setattr(model[0], "bias", None), r"'0\.bias' .* it is gone"),
        (lambda model: model.load_state_dict(net().state_dict()), "load_state_dict"),
    ],
)
def test_other_changes(change: Callable[[nn.Module], object], message: str) -> None:
    model = net()
    plan = freeze(model, ["0", "1"])
    change(model)
    with pytest.raises(FrozenError, match=message):
        plan.verify(model)


def test_what_trains_may_change() -> None:
    model = net()
    plan = freeze(model, ["0", "1"])
    with torch.no_grad():
        model[4].weight.add_(1)
    plan.verify(model)


def test_a_plan_that_was_never_applied_says_so() -> None:
    model = net()
    with pytest.raises(ConfigError, match=r"call plan\.apply"):
        make_plan(model, "0").verify(model)
    freeze(nn.Sequential(nn.ReLU()), None).verify(nn.Sequential(nn.ReLU()))


def test_caches_that_are_not_saved_may_change() -> None:
    model = net()
    model[0].register_buffer("cache", torch.zeros(2), persistent=False)
    plan = freeze(model, "0")
    model[0].cache = torch.ones(5)
    plan.verify(model)


def test_verifying_ninety_megabytes_is_quick(minilm_dir: Path) -> None:
    """The bound leaves room for a busy machine; alone it takes 0.08 s with SHA instructions."""
    from pyft.models.text import build_text_classifier

    model = build_text_classifier(minilm_dir, 5)
    plan = freeze(model, "head", only=True)
    times = []
    for _ in range(3):
        begun = time.process_time()
        plan.verify(model)
        times.append(time.process_time() - begun)
    assert min(times) < 0.6
    flip(model.encoder.get_parameter("encoder.layer.3.output.dense.weight"), 12345)
    with pytest.raises(FrozenError, match=r"'encoder\.encoder\.layer\.3\.output\.dense\.weight'"):
        plan.verify(model)
