"""Parameters spread over processes, or copied by DistributedDataParallel: the same as one process with the whole."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import on_ranks
import pytest
import torch
from family_float64 import CASES
from on_ranks import SHAPES, WORLD, same_values
from ranks import Ranks

import pyft

ELEMENTWISE = [case for case in CASES if case[0] != "Adafactor"]
SPREAD = ["shards", "copies of shards", "two dimensions"]


@pytest.fixture(autouse=True)
def no_emulation(emulation: Any) -> None:
    if emulation is not None:
        pytest.skip("the processes run on the CPU's core; test_optim_device.py has the emulated GPU's")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes in one group."""
    started = Ranks(WORLD, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def assert_same_on_all(results: list[Any]) -> Any:
    for result in results[1:]:
        assert repr(result) == repr(results[0])
    return results[0]


@pytest.mark.parametrize(("name", "options"), ELEMENTWISE, ids=str)
def test_shards_have_the_bits_of_the_whole(ranks: Ranks, assert_equal: Any, name: str, options: dict[str, Any]) -> None:
    [got, *_] = ranks(on_ranks.by_given_gradients, name, options, "shards", torch.float32, 5)
    want = on_ranks.by_given_gradients(name, options, None, torch.float32, 5)
    assert_equal(got["params"], want["params"])
    for ours, theirs in zip(got["state"], want["state"], strict=True):
        assert list(ours) == list(theirs)
        assert_equal(ours.values(), theirs.values())


PRECISE: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.bfloat16, {"weights": "split32"}),
    (torch.bfloat16, {"weights": "kahan"}),
    (torch.bfloat16, {"weights": "plain"}),
    (torch.float16, {}),
    (torch.float64, {}),
    (torch.float32, {"decay_to_init": 0.1}),
    (torch.float32, {"decay_to_init": 0.1, "init_dtype": "bfloat16"}),
    (torch.float32, {"clip_value": 0.3, "grads": "free"}),
]


@pytest.mark.parametrize("kind", SPREAD)
@pytest.mark.parametrize(("dtype", "options"), PRECISE, ids=str)
def test_options_by_element(ranks: Ranks, assert_equal: Any, kind: str, dtype: torch.dtype, options: Any) -> None:
    [got, *_] = ranks(on_ranks.by_given_gradients, "AdamW", {"lr": 0.01, **options}, kind, dtype, 5)
    want = on_ranks.by_given_gradients("AdamW", {"lr": 0.01, **options}, None, dtype, 5)
    assert_equal(got["params"], want["params"])
    for ours, theirs in zip(got["state"], want["state"], strict=True):
        assert_equal(ours.values(), theirs.values())


CLIPPING: list[dict[str, Any]] = [
    {"clip_norm": 5.0},
    {"clip_norm": 5.0, "clip_value": 0.5},
    {"clip_norm": 3.0, "clip_mode": "group"},
    {"clip_norm": 1.0, "clip_mode": "tensor"},
    {"clip_norm": {"tensor": 2.0, "group": 3.0}},
    {"clip_norm": {"tensor": 2.0, "global": 3.0}},
    {"on_nonfinite": "raise"},
]
BY_ROWS: list[dict[str, Any]] = [
    {"clip_norm": {"agc": 0.02}},
    {"clip_norm": {"agc": 0.5, "global": 5.0}, "clip_value": 1.0},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, options) for kind in SPREAD for options in CLIPPING),
        *(("shards", o) for o in BY_ROWS),
        *(("copies of shards", o) for o in BY_ROWS),
    ],
    ids=str,
)
def test_norms_are_those_of_the_whole(ranks: Ranks, kind: str, options: dict[str, Any]) -> None:
    given = {"lr": 0.01, "momentum": 0.9, **options}
    results = ranks(on_ranks.by_given_gradients, "SGD", given, kind, torch.float32, 5)
    want = on_ranks.by_given_gradients("SGD", given, None, torch.float32, 5)
    for got in results:
        for ours, theirs in zip(got["params"], want["params"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    norms = [[report[0] for report in got["reports"]] for got in results]
    assert_same_on_all(norms)
    limit = options.get("clip_value", math.inf)
    true = [
        math.sqrt(sum(float(g.double().clamp(-limit, limit).square().sum()) for g in same_values(SHAPES, 100 + step)))
        for step in range(5)
    ]
    assert norms[0] == pytest.approx(true, rel=1e-12)
    if options not in BY_ROWS:
        assert_same_on_all([got["reports"] for got in results])
        assert [r[1] for r in results[0]["reports"]] == pytest.approx([r[1] for r in want["reports"]], rel=1e-6)


def test_one_sum_over_the_processes_in_a_step(ranks: Ranks) -> None:
    for options, kind, of_each in (
        ({}, "shards", 0),
        ({"clip_norm": 1.0}, "shards", 1),
        ({"clip_norm": {"agc": 0.02, "global": 1.0}}, "shards", 1),
        ({"clip_norm": {"tensor": 1.0, "group": 1.0}}, "copies of shards", 1),
        ({"clip_norm": 1.0}, "two dimensions", 2),
    ):
        assert ranks(on_ranks.calls_of_all_reduce, options, kind, 3) == [3 * of_each] * WORLD


# In "two dimensions" and "shards" the last parameter is the same in every process.
@pytest.mark.parametrize(("number", "value"), [(0, math.nan), (4, math.inf), (len(SHAPES) - 1, math.nan)])
@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("kind", ["shards", "two dimensions"])
def test_all_processes_refuse_a_step_or_none(ranks: Ranks, kind: str, policy: str, value: float, number: int) -> None:
    results = ranks(on_ranks.one_bad_gradient, kind, 1, number, value, policy)
    written, counts, said, report = assert_same_on_all(results)
    assert not written
    assert counts == {1.0}
    if policy == "skip":
        assert report == (True, f"weight {number}", 1)
    else:
        assert f"'weight {number}'" in said
        assert f"shape {tuple(SHAPES[number])}" in said


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, 0.5, 40.0, math.inf])
@pytest.mark.parametrize("kind", SPREAD)
def test_clip_grad_norm(ranks: Ranks, kind: str, norm_type: float) -> None:
    options = {"max_norm": 1.5, "norm_type": norm_type}
    results = ranks(on_ranks.clipped, "clip_grad_norm_", kind, "pyft", options)
    assert_same_on_all(results)
    norm, grads = results[0]
    flat = np.concatenate([grad.double().numpy().ravel() for grad in same_values(SHAPES, 2, 3.0)])
    want = np.abs(flat).max() if norm_type == math.inf else (np.abs(flat) ** norm_type).sum() ** (1 / norm_type)
    assert norm == pytest.approx(want, rel=1e-6)
    for ours, before in zip(grads, same_values(SHAPES, 2, 3.0), strict=True):
        torch.testing.assert_close(ours, before * (1.5 / (want + 1e-6)), rtol=2e-6, atol=0.0)


# torch's own has no inf-norm where a process has no part of a gradient.
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_clip_grad_norm_of_torch(ranks: Ranks, norm_type: float) -> None:
    options = {"max_norm": 1e9, "norm_type": norm_type}
    [(theirs, _), *_] = ranks(on_ranks.clipped, "clip_grad_norm_", "shards", "torch", options)
    whole = torch.nn.utils.get_total_norm(same_values(SHAPES, 2, 3.0)[:-1], norm_type)
    assert theirs == pytest.approx(float(whole), rel=1e-5)
    [(ours, _), *_] = ranks(on_ranks.clipped, "clip_grad_norm_", "shards", "pyft", options)
    last = float(torch.linalg.vector_norm(same_values(SHAPES, 2, 3.0)[-1], norm_type))
    assert ours == pytest.approx((theirs**norm_type + last**norm_type) ** (1 / norm_type), rel=1e-5)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("grad_norm", {}),
        ("clip_grad_value_", {"clip_value": 0.5}),
        ("clip_grad_agc_", {"clipping": 0.05}),
    ],
)
@pytest.mark.parametrize("kind", ["shards", "copies of shards"])
def test_other_functions_of_clipping(ranks: Ranks, kind: str, function: str, options: dict[str, Any]) -> None:
    results = ranks(on_ranks.clipped, function, kind, "pyft", options)
    want, grads = on_ranks.clipped(function, None, "pyft", options)
    for norm, ours in results:
        assert norm == (None if want is None else pytest.approx(want, rel=1e-6))
        for one, other in zip(ours, grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)


def in_one_process(name: str, options: dict[str, Any], clip_norm: float, steps: int = 20) -> Any:
    """Parameters and norms of torch's own training, in float64 and with the whole batch."""
    model = on_ranks.net(torch.float64)
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    norms = []
    for step in range(steps):
        x, y = on_ranks.batch(step, torch.float64)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)))
        optimizer.step()
    return dict(model.named_parameters()), norms


TRAININGS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"lr": 0.002, "momentum": 0.5}),
    ("Adagrad", {"lr": 0.02}),
]


@pytest.mark.parametrize(("name", "options"), TRAININGS, ids=str)
def test_fully_shard_trains_as_one_process(ranks: Ranks, name: str, options: Any) -> None:
    results = ranks(on_ranks.train_shards, name, {**options, "clip_norm": 0.5})
    want, norms = in_one_process(name, options, 0.5)
    assert_same_on_all(results)
    for ours, theirs in zip(results[0]["params"], want.values(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=2e-4, atol=2e-5)
    assert results[0]["norms"] == pytest.approx(norms, rel=2e-4)


@pytest.fixture(scope="module")
def clipped_training(ranks: Ranks) -> Any:
    """What a training of 5 steps comes to."""
    return ranks(on_ranks.train_shards, "AdamW", {"lr": 0.01, "clip_norm": 0.5}, 5)


@pytest.mark.parametrize("options", [{"norm_in_backward": True}, {"grads": "free"}], ids=str)
def test_ways_to_the_same_bits(ranks: Ranks, clipped_training: Any, options: dict[str, Any]) -> None:
    got = ranks(on_ranks.train_shards, "AdamW", {"lr": 0.01, "clip_norm": 0.5, **options}, 5)
    assert repr(got) == repr(clipped_training)


def test_norms_in_backward_are_used(ranks: Ranks) -> None:
    """Each of the 8 gradients that this process has a part of."""
    assert ranks(on_ranks.sums_known_in_backward) == [8] * WORLD


def test_step_in_backward_of_shards(ranks: Ranks, assert_equal: Any) -> None:
    given = {"lr": 0.01, "clip_norm": {"tensor": 0.1}}
    [late, *_] = ranks(on_ranks.train_shards, "AdamW", given, 5)
    [early, *_] = ranks(on_ranks.train_shards, "AdamW", {**given, "step_in_backward": True}, 5)
    assert_equal(early["params"], late["params"])


COPIES = [("plain", *case) for case in [*TRAININGS, ("Lion", {"lr": 0.002}), ("Adafactor", {"lr": 0.01})]]
COPIES += [(how, *TRAININGS[0]) for how in ("views", "accumulated", "parts")]


@pytest.mark.parametrize(("how", "name", "options"), COPIES, ids=str)
def test_copies_train_as_one_process(ranks: Ranks, how: str, name: str, options: Any) -> None:
    results = ranks(on_ranks.train_copies, name, {**options, "clip_norm": 0.5}, how)
    got = assert_same_on_all(results)
    model = on_ranks.net(torch.float64)
    if how == "parts":
        frozen = pyft.freeze(model, on_ranks.PARTS)
        assert frozen.num_trainable < sum(param.numel() for param in model.parameters())
    trained = [param for param in model.parameters() if param.requires_grad]
    cls = getattr(torch.optim, name, None) or getattr(pyft.optim, name)
    optimizer = cls(trained, **options)
    for step in range(20):
        x, y = on_ranks.batch(step, torch.float64)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    for key, theirs in model.state_dict().items():
        # Where an update of Lion is near 0 its sign is that of roundings.
        atol = 0.03 if name == "Lion" else 2e-5
        torch.testing.assert_close(got["state"][key].double(), theirs, rtol=2e-4, atol=atol)
    if how == "parts":
        # Row 0 of the first layer is frozen, and keeps its bits.
        assert torch.equal(got["state"]["0.weight"][0], got["before"]["0.weight"][0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_copies_skip_together(ranks: Ranks, value: float) -> None:
    assert ranks(on_ranks.one_bad_rank_of_copies, value) == [(False, True, "0.weight", 1)] * WORLD


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("adafactor", ["TypeError", "params[0] is spread over processes", "Adafactor", "state_dtype='int8'"]),
        ("cut_rows", ["ValueError", "parameter number 0", "Shard(dim=1)", "shard it on dimension 0"]),
        ("cut_rows_clipped", ["ValueError", "parameters[0].grad", "Shard(dim=1)", "shard it on dimension 0"]),
        ("two_meshes", ["ValueError", "parameter number 1", "number 0", "an optimizer of its own"]),
        ("partial_sums", ["TypeError", "params[0]", "Partial(sum)", "redistribute()"]),
        ("whole_state", ["ValueError", "state 'exp_avg' of shape (13, 7)", "set_optimizer_state_dict"]),
        ("sharded_parts", ["ConfigError", "shape (13, 7)", "fully_shard", "DistributedDataParallel"]),
        ("whole_gradient", ["TypeError", "parameter 0 is a DTensor but its gradient a Tensor"]),
        ("norms_of_copies", ["ValueError", "norm_in_backward in several processes", "leave it off", "fully_shard"]),
        ("steps_of_copies", ["ValueError", "step_in_backward in several processes", "leave it off", "fully_shard"]),
    ],
)
def test_what_is_refused(ranks: Ranks, action: str, words: list[str]) -> None:
    said = assert_same_on_all(ranks(on_ranks.refused, action))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("options", "saver"),
    [
        ({"lr": 0.01, "clip_norm": 0.5, "amsgrad": True}, "pyft"),
        ({"lr": 0.01, "decay_to_init": 0.1}, "pyft"),
        ({"lr": 0.01, "state_dtype": "int8"}, "pyft"),
        ({"lr": 0.01, "state_dtype": "bfloat16"}, "pyft"),
        ({"lr": 0.01}, "torch"),
    ],
    ids=str,
)
def test_distributed_checkpoints(ranks: Ranks, assert_equal: Any, tmp_path: Path, options: Any, saver: str) -> None:
    [(straight, again, placed), *_] = ranks(on_ranks.saved_and_loaded, str(tmp_path), options, saver)
    assert placed or "int8" in options.values()
    if saver == "pyft":
        assert_equal(again, straight)
    else:
        for one, other in zip(again, straight, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_state_of_a_whole_model(ranks: Ranks) -> None:
    [saved, *_] = ranks(on_ranks.whole_state_of_shards, 3, None)
    model = on_ranks.net(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        x, y = on_ranks.batch(step, torch.float64)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    for name, param in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            ours = saved["state"][name][key].double()
            torch.testing.assert_close(ours, optimizer.state[param][key], rtol=1e-4, atol=1e-7)
        assert saved["state"][name]["step"] == 3
    [again, *_] = ranks(on_ranks.whole_state_of_shards, 0, saved)
    for name, of_one in saved["state"].items():
        for key, value in of_one.items():
            assert torch.equal(again["state"][name][key], value)


def test_8_bit_moments_of_shards(ranks: Ranks) -> None:
    given: dict[str, Any] = {"lr": 0.01}
    [coded, *_] = ranks(on_ranks.by_given_gradients, "AdamW", {**given, "state_dtype": "int8"}, "shards")
    want = on_ranks.by_given_gradients("AdamW", given, None)
    # Of tensors with enough elements for a mean.
    for number in (0, 2, 4, 7):
        moved = want["params"][number] - same_values(SHAPES, 1)[number]
        off = coded["params"][number] - want["params"][number]
        assert 0.0 < float(off.norm()) < 0.25 * float(moved.norm())
    # Of 30 rows a part has 8: 160 elements, one block; of 257 a part has 65.
    assert coded["state"][0]["exp_avg_scale"].shape == (4, 1)
    assert coded["state"][0]["exp_avg_q8"].shape == SHAPES[0]


def test_copies_of_a_part_are_rounded_alike_and_parts_are_not(ranks: Ranks) -> None:
    parts = [part for part, _ in ranks(on_ranks.rounded_at_random, "copies of shards")]
    assert torch.equal(parts[0], parts[2])
    assert torch.equal(parts[1], parts[3])
    assert not torch.equal(parts[0], parts[1])
    [(_, whole), *_] = ranks(on_ranks.rounded_at_random, "shards")
    assert float(whole.float().mean()) == pytest.approx(1.0 - 2.0**-9, abs=2e-4)


def test_a_process_that_is_gone_is_an_error(tmp_path: Path) -> None:
    two = Ranks(2, tmp_path)
    began = time.monotonic()
    two.start(on_ranks.leave_in_the_middle)
    assert two.finish(0) == "an error"
    two.processes[1].join(10)
    assert two.processes[1].exitcode == 3
    assert time.monotonic() - began < 20
    two.close()
