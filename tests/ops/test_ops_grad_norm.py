"""grad_norm: against numpy in float64, on every CPU target, at awkward sizes and layouts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyft.ops import grad_norm
from pyft.ops.grad_norm import grad_norm_reference

SIZES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 8191, 16383, 16384, 16385, 65537, 100_003]


def norm_float64(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(np.sum(t.double().numpy() ** 2)) for t in tensors))


@pytest.mark.parametrize("size", SIZES)
def test_equals_float64_at_every_tail(cpu_target: str, size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert float(grad_norm([x])) == pytest.approx(norm_float64([x]), rel=6e-8, abs=0)


def test_view_at_odd_offset_reads_nothing_around_it(cpu_target: str) -> None:
    for offset in (1, 3, 7):
        whole = torch.full((200,), float("nan"))
        view = whole[offset : offset + 101]
        view.copy_(torch.arange(101.0))
        assert float(grad_norm([view])) == pytest.approx(norm_float64([view]), rel=6e-8)


def test_same_bits_for_any_thread_count_and_target(core, one_thread_then_two: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 1000, 40_000, 7, 300_001, 0, 64]
    tensors = [torch.randn(n, generator=generator) * 10.0 ** (i - 3) for i, n in enumerate(sizes)]
    tensors.append(torch.randn(9_000_000, generator=generator))
    bits = set()
    for target in core.build_info()["cpu_targets"]:
        core.set_cpu_target(target)
        for threads in one_thread_then_two:
            torch.set_num_threads(threads)
            bits.add(grad_norm(tensors).view(torch.int32).item())
            bits.add(grad_norm(tensors[:-1]).view(torch.int32).item() ^ 0x5A5A5A5A)
    core.set_cpu_target("auto")
    assert len(bits) == 2


def test_no_overflow_where_fp32_squares_would(backend: str) -> None:
    x = torch.full((1000,), 1e30)
    assert float(grad_norm([x])) == pytest.approx(1e30 * math.sqrt(1000), rel=1e-6)
    assert float(grad_norm([torch.full((4,), 1e-30)])) == pytest.approx(2e-30, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_nonfinite_is_seen_wherever_it_is(backend: str, bad: float, place: int) -> None:
    x = torch.ones(1000)
    x[place] = bad
    norm = float(grad_norm([torch.ones(5), x]))
    assert math.isnan(norm) if math.isnan(bad) else norm == float("inf")


def test_nothing_and_empty_have_norm_zero(backend: str) -> None:
    assert float(grad_norm([])) == 0.0
    assert float(grad_norm([torch.empty(0), torch.empty(3, 0)])) == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.t(),
        lambda x: x[::2, ::3],
        lambda x: x[:, :1].expand(-1, 7),
        lambda x: x.reshape(2, 4, 5, 5).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "expanded", "channels_last"],
)
def test_any_layout(backend: str, make) -> None:
    x = make(torch.randn(20, 10, generator=torch.Generator().manual_seed(3)))
    assert float(grad_norm([x])) == pytest.approx(norm_float64([x]), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_do_not_overflow_or_round_the_result(backend: str, dtype: torch.dtype) -> None:
    x = torch.full((9000,), 1000.0, dtype=dtype)
    norm = grad_norm([x])
    assert float(norm) == pytest.approx(1000.0 * math.sqrt(9000), rel=1e-6)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_mixed_dtypes(backend: str) -> None:
    tensors = [torch.randn(50), torch.randn(50).bfloat16(), torch.randn(50).half()]
    assert float(grad_norm(tensors)) == pytest.approx(norm_float64(tensors), rel=1e-6)


def test_reference_agrees_with_core(core) -> None:
    tensors = [torch.randn(n) for n in (5, 70_000, 333)]
    assert float(grad_norm_reference(tensors)) == pytest.approx(float(grad_norm(tensors)), rel=1.2e-7)


def test_bad_input_is_refused_by_name(backend: str) -> None:
    with pytest.raises(TypeError, match=r"grads\[1\].*sparse"):
        grad_norm([torch.ones(2), torch.ones(2, 2).to_sparse()])
    with pytest.raises(TypeError, match=r"grads\[0\].*int64"):
        grad_norm([torch.ones(2, dtype=torch.int64)])


def test_raw_op_refuses_what_the_core_cannot_take(core) -> None:
    with pytest.raises(RuntimeError, match=r"grads\[0\] must be float32"):
        torch.ops.pyft.grad_norm([torch.ones(3, dtype=torch.bfloat16)])
    with pytest.raises(RuntimeError, match=r"grads\[0\].*gaps or overlaps"):
        torch.ops.pyft.grad_norm([torch.ones(8)[::2]])


def test_opcheck_with_core(core) -> None:
    torch.library.opcheck(torch.ops.pyft.grad_norm.default, ([torch.randn(5), torch.randn(3, 2)],))


def test_compile_sees_no_graph_break(backend: str) -> None:
    tensors = [torch.randn(10), torch.randn(3, 4)]
    compiled = torch.compile(lambda ts: grad_norm(ts) * 2, fullgraph=True, backend="eager")
    assert float(compiled(tensors)) == pytest.approx(2 * norm_float64(tensors), rel=1e-6)
