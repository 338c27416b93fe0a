"""Steps on a GPU in each of several processes, on emulated ones: the collective is between launches, nothing waits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import on_ranks
import pytest
import torch
from on_ranks import SHAPES, WORLD, same_values
from ranks import Ranks

OPTIONS: list[dict[str, Any]] = [
    {"clip_norm": 5.0},
    {"clip_norm": 1.0, "clip_mode": "tensor", "clip_value": 0.5},
    {"clip_norm": {"tensor": 2.0, "group": 3.0}},
    {"on_nonfinite": "skip"},
]


@pytest.fixture(scope="module")
def ranks(emulation: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes with an emulated GPU each."""
    if emulation is None:
        pytest.skip("runs on the CUDA emulation: pytest --cuda-emulation=ascending")
    started = Ranks(WORLD, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["shards", "copies of shards", "two dimensions"])
def test_norms_are_those_of_the_whole(ranks: Ranks, emulation: Any, kind: str, options: dict[str, Any]) -> None:
    given = ("SGD", {"lr": 0.01, "momentum": 0.9, **options})
    results = ranks(on_ranks.on_emulated_gpus, emulation.order, on_ranks.by_given_gradients, *given, kind)
    want = on_ranks.by_given_gradients(*given, None)
    true = [
        math.sqrt(sum(float(grad.double().clamp(*limits).square().sum()) for grad in same_values(SHAPES, 100 + step)))
        for limits in [(-options.get("clip_value", math.inf), options.get("clip_value", math.inf))]
        for step in range(20)
    ]
    for got in results:
        assert got["reports"] == results[0]["reports"]
        assert [report[0] for report in got["reports"]] == pytest.approx(true, rel=1e-12)
        for ours, theirs in zip(got["params"], want["params"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["shards", "two dimensions"])
def test_nothing_waits(ranks: Ranks, emulation: Any, kind: str, options: dict[str, Any]) -> None:
    for counters, report, waits in ranks(
        on_ranks.on_emulated_gpus, emulation.order, on_ranks.step_without_waiting, kind, options
    ):
        # Norms, their sums, the decision once these are added up, the update.
        assert counters["launches"] == 4
        assert counters["synchronisations"] == 0
        assert waits == []
        assert math.isfinite(report[0])


@pytest.mark.parametrize(("number", "value"), [(0, math.nan), (4, math.inf), (len(SHAPES) - 1, math.nan)])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_all_processes_refuse_a_step_or_none(
    ranks: Ranks, emulation: Any, policy: str, value: float, number: int
) -> None:
    results = ranks(
        on_ranks.on_emulated_gpus,
        emulation.order,
        on_ranks.one_bad_gradient,
        "two dimensions",
        1,
        number,
        value,
        policy,
    )
    for written, counts, said, report in results:
        assert not written
        assert counts == {1.0}
        assert report == (True, f"weight {number}", 1) if policy == "skip" else f"'weight {number}'" in said
