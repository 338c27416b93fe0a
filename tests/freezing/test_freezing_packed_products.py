"""Frozen Linear layers with packed weights while features are computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pyft.core.loader import load_core
from pyft.freezing import packed_products as module
from pyft.freezing.lean import lean
from pyft.freezing.packed_products import packed_products
from pyft.freezing.prefix_cache import PrefixCache

X = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def avx2() -> Iterator[None]:
    core = load_core()
    if core is None or "avx2" not in core.build_info()["cpu_targets"]:
        pytest.skip("no core, or no AVX2: torch's products are taken")
    core.set_cpu_target("avx2")
    yield
    core.set_cpu_target("auto")


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that were packed."""
    seen: list[tuple[int, ...]] = []
    own = module.pack_linear
    monkeypatch.setattr(module, "pack_linear", lambda weight: seen.append(tuple(weight.shape)) or own(weight))
    return seen


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False), nn.Linear(64, 8))
    model = nn.Sequential(body.requires_grad_(False).eval(), nn.Linear(8, 3))
    return model.train()


def oracle(model: nn.Sequential) -> torch.Tensor:
    copy = net()
    copy.load_state_dict(model.state_dict())
    return copy[0].double()(X.double())


def test_a_fill_packs_each_wide_weight_once(packs: list[tuple[int, ...]]) -> None:
    model = net()
    cache = PrefixCache(model, X[:4], storage="ram")
    cache.fill([(range(start, start + 16), X[start : start + 16]) for start in range(0, 96, 16)])
    # 64 to 8 is too narrow.
    assert sorted(packs) == [(64, 128), (128, 64)]
    assert (cache.values(range(96)) - oracle(model)).abs().max() < 1e-5
    assert all("forward" not in vars(one) for one in model.modules())
    # What is played is compared with the model's own products first.
    with cache.batch(range(8)):
        found = model(X[:8])
    assert cache.reason is None
    assert (found - model(X[:8])).abs().max() < 1e-5


def test_the_same_bits_in_batches_of_any_size(packs: list[tuple[int, ...]]) -> None:
    found = []
    for size in (1, 7, 96):
        cache = PrefixCache(net(), X[:4], storage="ram")
        cache.fill([(range(at, min(at + size, 96)), X[at : at + size]) for at in range(0, 96, size)])
        found.append(cache.values(range(96)))
    # torch's own product of the narrow layer may depend on the batch.
    assert len(packs) == 6
    assert all((found[0] - other).abs().max() < 1e-6 for other in found[1:])


def test_lean_layers_take_part(packs: list[tuple[int, ...]]) -> None:
    model = net()
    forms = lean(model)
    cache = PrefixCache(model, X[:4], storage="ram")
    cache.fill([(range(96), X)])
    forms.release()
    assert len(packs) == 2


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("case", ["grad", "double", "autocast", "subclass", "own forward", "elsewhere", "baseline"])
def test_left_alone(packs: list[tuple[int, ...]], case: str) -> None:
    model, x = net(), X
    if case == "subclass":
        model[0][0].__class__ = Scaled
    if case == "own forward":
        model[0][0].forward = lambda input: nn.functional.linear(input, 2 * model[0][0].weight)
    if case == "double":
        model, x = model.double(), x.double()
    if case == "baseline":
        load_core().set_cpu_target("baseline")
    first = model[0][:1]
    with torch.set_grad_enabled(case == "grad"), torch.autocast("cpu", enabled=case == "autocast"):
        want = first(x)
        with packed_products(model, ["1"] if case == "elsewhere" else ["0"]):
            assert torch.equal(first(x), want)
    assert not packs


def test_a_failure_gives_the_layers_their_forward_back() -> None:
    model = net()
    inputs = iter([(range(4), X[:4])])
    cache = PrefixCache(model, X[:4], storage="ram")

    def stop(_: int) -> None:
        assert "forward" in vars(model[0][0])
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        cache.fill(inputs, progress=stop)
    assert all("forward" not in vars(one) for one in model.modules())
