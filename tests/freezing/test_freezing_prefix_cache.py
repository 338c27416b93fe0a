"""A model whose frozen part is played back is the model, or says why it cannot be."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen_bodies import Body, X, both_ways, frozen, make, residual
from torch import nn
from torch.nn import functional as F

import pyft
from pyft.errors import ConfigError
from pyft.freezing.prefix_cache import PrefixCache
from pyft.freezing.prefix_cache_play import StandIn


def counted(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_frozen_part_is_not_run_again() -> None:
    model = frozen(Body())
    model.two[0].forward = lambda x, own=model.two[0].forward: ran.append(1) or own(x)
    ran: list[int] = []
    cache = PrefixCache(model, X[:5], checks=0)
    ran.clear()
    for _ in range(3):
        with cache.batch([0, 1, 2]):
            model(X[:3])
    assert len(ran) == 1
    assert model.two.__dict__.get("forward") is None


def test_only_the_frontier_is_stored() -> None:
    model, cache = make()
    both_ways(model, cache)
    assert cache.nbytes == 12 * 8 * 4
    assert len(cache) == 12


def used_twice(model: Body, x: torch.Tensor) -> torch.Tensor:
    a = model.one(x)
    return model.head(model.tail(a) + model.two(a) + a)


def called_twice(model: Body, x: torch.Tensor) -> torch.Tensor:
    a = model.two(model.two(model.one(x)))
    return model.head(model.tail(a)) + model.head(model.two(model.tail(a)))


def changed_in_place(model: Body, x: torch.Tensor) -> torch.Tensor:
    a = model.one(x)
    a += 1
    a.mul_(2)
    return model.head(model.tail(model.two(a)))


def changed_later(model: Body, x: torch.Tensor) -> torch.Tensor:
    a = model.two(model.one(x))
    y = model.head(model.tail(a.clone()))
    a.zero_()
    return y + a.sum(1, keepdim=True)


def numbers(model: Body, x: torch.Tensor) -> torch.Tensor:
    a = model.two(model.one(x))
    return model.head(model.tail(a) * float(a.shape[1]) + (1.0 if a.ndim == 2 else a.mean()))


def through_no_grad(model: Body, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        chosen = model.tail(model.one(x)).argmax(1)
    return model.head(model.two(torch.eye(8)[chosen]) + model.tail(model.two(model.one(x))))


def dropout_between(model: Body, x: torch.Tensor) -> torch.Tensor:
    a = F.dropout(model.one(x), 0.5, training=model.training)
    return model.head(model.tail(model.two(a)))


@pytest.mark.parametrize(
    "forward",
    [
        residual,
        used_twice,
        called_twice,
        changed_in_place,
        changed_later,
        numbers,
        through_no_grad,
        dropout_between,
    ],
)
def test_any_code_gives_the_same_bits(forward: Callable[..., Any]) -> None:
    both_ways(*make(forward))


def test_what_depends_on_training_through_integers_is_run_each_time() -> None:
    model, cache = make(through_no_grad)
    # The first call of "two" gets what the tail has chosen.
    assert set(cache.prefix.cut.script.sites) == {("one", 0), ("one", 1), ("two", 1)}
    with cache.batch(range(5)):
        model(X[:5])
    with torch.no_grad():
        model.tail.weight.neg_()
    with cache.batch(range(5)):
        played = model(X[:5])
    assert torch.equal(played, model(X[:5]))


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"a": (x * 2, [x + 1, None]), "n": 3, "same": x * 3}


def test_structures_are_given_back() -> None:
    def forward(model: Body, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = model.several(model.one(x))
        assert found["n"] == 3
        assert found["a"][1][1] is None
        return {"logits": model.head(model.tail(found["a"][0] + found["a"][1][0]))}

    model = Body(forward)
    model.several = Several()
    frozen(model, "one", "two")
    pyft.freeze(model, lambda name, _: name.startswith(("one", "two", "several")))
    cache = PrefixCache(model.train(), X[:5])
    both_ways(model, cache)


def test_the_model_may_give_frozen_values() -> None:
    def forward(model: Body, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = model.two(model.one(x))
        return model.head(model.tail(a)), a

    model, cache = make(forward)
    for _ in range(2):
        with cache.batch([3, 1]):
            out = model(X[[3, 1]])
        assert not isinstance(out[1], StandIn)
        assert torch.equal(out[1], model(X[[3, 1]])[1])


class Shared(nn.Module):
    """A value without a row per sample, which the trainable part takes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.arange(x.shape[1], dtype=torch.float32).sin().view(1, -1)


def test_what_has_no_row_per_sample_is_computed_each_time() -> None:
    def forward(model: Body, x: torch.Tensor) -> torch.Tensor:
        a = model.two(model.one(x))
        return model.head(model.tail(a) + model.shared(a))

    model = Body(forward)
    model.shared = Shared()
    cache = PrefixCache(frozen(model), X[:5])
    both_ways(model, cache)
    assert cache.nbytes == 12 * 8 * 4


def test_a_stand_in_has_a_shape_and_no_values() -> None:
    seen = []

    def forward(model: Body, x: torch.Tensor) -> torch.Tensor:
        a = model.one(x)
        seen.append(a)
        return model.head(model.tail(model.two(a)))

    model, cache = make(forward)
    for _ in range(2):
        with cache.batch([0, 1, 2]):
            model(X[:3])
    assert isinstance(seen[-1], StandIn)
    assert seen[-1].shape == (3, 8)
    assert seen[-1].dtype == torch.float32
    with pytest.raises(Exception, match="not stored"):
        seen[-1] + 1
    with pytest.raises(Exception, match=r"not stored|storage|not supported"):
        seen[-1].tolist()


def test_another_way_for_other_data_falls_back_to_the_model() -> None:
    def forward(model: Body, x: torch.Tensor) -> torch.Tensor:
        a = model.one(x)
        b = a.relu() if x.sum() > 100 else a
        return model.head(model.tail(model.two(b)))

    model = frozen(Body(forward))
    said: list[str] = []
    cache = PrefixCache(model, X[:5], say=said.append, checks=0)
    big = X[:3] + 100
    for _ in range(2):
        with cache.batch([0, 1, 2]):
            assert torch.equal(model(X[:3]), model(X[:3]))
    with cache.batch([3, 4, 5]):
        out = model(big)
    assert torch.equal(out, model(big))
    assert cache.reason is not None
    assert len(said) == 1
    with cache.batch([0, 1, 2]):
        assert torch.equal(model(X[:3]), model(X[:3]))


def test_another_way_is_found_by_a_module_that_is_not_called() -> None:
    def forward(model: Body, x: torch.Tensor) -> torch.Tensor:
        a = model.one(x)
        return model.head(model.tail(model.two(a) if x.sum() < 100 else x.mean() * torch.ones(len(x), 8)))

    model = frozen(Body(forward))
    cache = PrefixCache(model, X[:5], say=lambda _: None)
    with cache.batch([3, 4, 5]):
        out = model(X[:3] + 100)
    assert torch.equal(out, model(X[:3] + 100))
    assert "depends on the data" in str(cache.reason)


# ---------------------------------------------------------------- refusals


class Noise(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "tensor":
            return x + torch.randn_like(x)
        if self.kind == "drop_path":
            return x * x.new_empty(len(x), 1).bernoulli_(0.5)
        return x * random.random()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Dropout(0.5), r"dropout 'zero' is on"),
        (nn.BatchNorm1d(6, affine=False), r"'zero' takes the statistics of each batch"),
        (Noise("tensor"), r"'zero' draws at random while training"),
        (Noise("drop_path"), r"'zero' draws at random while training"),
        (Noise("python"), r"'zero' draws from random or numpy"),
        (nn.Linear(6, 6), r"'zero\.weight' trains"),
    ],
)
def test_the_reason_is_named(module: nn.Module, reason: str) -> None:
    model = Body(lambda m, x: m.head(m.tail(m.two(m.one(m.zero(x))))))
    model.zero = module
    frozen(model)
    before = torch.get_rng_state(), random.getstate(), {n: b.clone() for n, b in model.named_buffers()}
    with pytest.raises(ConfigError, match=reason):
        PrefixCache(model, X[:5])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(torch.equal(b, before[2][n]) for n, b in model.named_buffers())
    assert model.training


def test_dropout_in_a_frozen_module_is_off() -> None:
    model = Body()
    model.two.append(nn.Dropout(0.5))
    cache = PrefixCache(frozen(model), X[:5])
    both_ways(model, cache)


@pytest.mark.parametrize("kind", ["batch", "memory"])
def test_what_depends_on_other_samples_or_earlier_calls_is_refused(kind: str) -> None:
    def forward(model: Body, x: torch.Tensor) -> torch.Tensor:
        a = model.one(x)
        if kind == "batch":
            return model.head(model.tail(model.two(a - a.mean(0))))
        b = model.head(model.tail(model.two(a)))
        return b + model.two.kept.sum()

    model = Body(forward)
    if kind == "memory":
        own = model.two.forward

        def keeping(x: torch.Tensor) -> torch.Tensor:
            model.two.kept = own(x)
            return model.two.kept

        model.two.forward = keeping
    with pytest.raises(ConfigError, match=r"depends on the other samples|keeps"):
        PrefixCache(frozen(model), X[:5])


def test_a_module_that_comes_into_train_mode_is_told() -> None:
    model = Body()
    model.requires_grad_(True)
    model.one.requires_grad_(False)
    model.train()
    model.one.eval()
    cache = PrefixCache(model, X[:5])
    model.train()
    with pytest.raises(ConfigError, match="was in eval mode"), cache.batch([0, 1]):
        model(X[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "tape"}, "storage='tape'"),
        ({"augment_views": 0}, "augment_views=0"),
        ({"augment_views": True}, "augment_views=True"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_wrong_batches() -> None:
    model, cache = make()
    with pytest.raises(ConfigError, match="3 for a batch of 2"), cache.batch([0, 1, 2]):
        model(X[:2])
    with pytest.raises(ConfigError, match="0 or more"), cache.batch([-1]):
        pass
    with pytest.raises(ConfigError, match="two samples"):
        PrefixCache(frozen(Body()), X[:1])
    with pytest.raises(ConfigError, match="no parameter trains"):
        PrefixCache(frozen(Body(), "*"), X[:5])
    # An error in between leaves the model as it was.
    assert all("forward" not in vars(module) for module in model.modules())


# ---------------------------------------------------------------- batches


def test_batches_of_some_known_and_some_new_samples() -> None:
    model, cache = make()
    for index in ([0, 1, 2], [2, 3, 1], [3, 3, 0], [5, 5, 4], [5, 4, 5, 2]):
        with cache.batch(index):
            out = model(X[index])
        torch.testing.assert_close(out, model(X[index]))
    assert len(cache) == 6
    assert cache.reason is None


def test_views_of_a_sample_are_kept_apart() -> None:
    model, cache = make(augment_views=2)

    def batch(epoch: int) -> torch.Tensor:
        return X[:4] + epoch % 2

    outs = []
    for epoch in range(4):
        with cache.batch(range(4), view=epoch):
            outs.append(model(batch(epoch)))
    assert (cache.filled, cache.played) == (2, 2)
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])
    assert not torch.equal(outs[0], outs[1])


def test_fill_then_train() -> None:
    model, cache = make()
    done: list[int] = []
    cache.fill([(range(6), X[:6]), (range(6, 12), X[6:])], progress=done.append)
    assert done == [6, 6]
    assert model.training
    for index in ([11, 0, 5], [1, 2]):
        with cache.batch(index):
            out = model(X[index])
        torch.testing.assert_close(out, model(X[index]))
        out.sum().backward()
    assert (cache.filled, cache.played) == (0, 2)


def test_evaluation_takes_from_the_store() -> None:
    model, cache = make()
    cache.fill([(range(12), X)])
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), cache.batch([4, 2]):
            out = model(X[[4, 2]])
        torch.testing.assert_close(out, model(X[[4, 2]]))
    assert cache.played == 2
    assert cache.reason is None


def test_no_warning_is_given() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, cache = make(residual)
        both_ways(model, cache)


def test_autocast_values_are_stored_as_computed() -> None:
    model = frozen(Body())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = PrefixCache(model, X[:5])
        for _ in range(3):
            with cache.batch(range(4)):
                out = model(X[:4])
        assert torch.equal(out, model(X[:4]))
    assert (cache.filled, cache.played, cache.nbytes) == (1, 2, 4 * 8 * 2)


def test_channels_last_values_keep_their_layout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2))
    model.to(memory_format=torch.channels_last)
    pyft.freeze(model, ["0"])
    model.train()
    images = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    cache = PrefixCache(model, images)
    layouts = []
    model[2].register_forward_pre_hook(lambda _, args: layouts.append(args[0].stride()))
    for _ in range(3):
        with cache.batch(range(6)):
            out = model(images)
        assert torch.equal(out, model(images))
    assert len(set(layouts)) == 1
    assert layouts[0][1] == 1


@pytest.mark.parametrize("compiled", ["wrapped", "in place"])
def test_a_compiled_model_runs_as_the_model_it_was_made_of(compiled: str) -> None:
    plain, graphs = frozen(Body()), []
    expected = [plain(X[:4]), plain(X[4:8])]

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    if compiled == "in place":
        plain.compile(backend=backend)
    model = torch.compile(plain, backend=backend) if compiled == "wrapped" else plain
    model(X[:4])
    made = len(graphs)
    cache = PrefixCache(model, X[:5], checks=0)
    cache.fill([(range(8), X[:8])])
    for start in (0, 4):
        with cache.batch(range(start, start + 4)):
            out = model(X[start : start + 4])
        assert torch.equal(out, expected[start // 4])
    out.sum().backward()
    assert (cache.reason, cache.played) == (None, 2)
    assert made == len(graphs) > 0
