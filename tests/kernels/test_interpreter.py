"""The interpreter as the tests speed it up: the results and the errors of Triton's own."""

import pytest
import torch
import triton
import triton.language as tl

from meloformer.kernels.plan import Plan
from meloformer.kernels.triton_backend import Backend

from helpers.attention_cases import INPUTS, PHASES, case, outputs_and_gradients, random_inputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@pytest.fixture
def own():
    """A context manager: Triton as it is without the helper."""
    from helpers.interpreter import as_triton_has_it

    return as_triton_has_it


@triton.jit
def _most_of_both(a, b):
    return tl.maximum(a, b) + (a & b & 1) * 0


@triton.jit
def _operations_kernel(x_ptr, y_ptr, out_ptr, number, ROWS: tl.constexpr):
    """Numbers of all kinds on either side, scalars, blocks that broadcast, reductions along both axes."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, 8)
    at = rows[:, None] * 8 + columns[None, :]
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at, mask=columns[None, :] < 5, other=3)
    out = tl.where(x > 2, x * 2 - 1, 7 - x) + (x // 3) % 2 + (y.to(tl.int64) << 1).to(tl.int32)
    out += tl.reduce(out, 0, _most_of_both)[None, :] - tl.reduce(out, 1, _most_of_both, keep_dims=True)
    out = out ^ (number + True) | ~(out >> 2) & 5
    half = (x.to(tl.float32) + 0.5) * -1.5 / 2
    out += tl.where((half < 0) & (x == y), -half, 1.0).to(tl.int32) + tl.sum(x, 0)[None, :] + number * 0
    tl.store(out_ptr + at, out)


@triton.jit
def _shapes_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 8), tl.arange(0, 4) + tl.arange(0, 8))


@triton.jit
def _size_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 8), tl.sum(tl.cat(tl.arange(0, 2), tl.arange(0, 4), can_reorder=True), 0))


@triton.jit
def _number_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 8), tl.arange(0, 8) + 2**33)


@triton.jit
def _kinds_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 8), (tl.arange(0, 8) + 0.5) & 1)


@triton.jit
def _pointers_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 8), x_ptr * 2)


def compute() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(-9, 9, (2, 16, 8), dtype=torch.int32, generator=generator)
    out = torch.zeros_like(x)
    _operations_kernel[(1,)](x, y, out, 5, ROWS=16)
    return out


def test_operations_are_those_of_triton(own):
    ours = compute()
    with own():
        expected = compute()
    assert torch.equal(ours, expected) and len(ours.unique()) > 16


@pytest.mark.parametrize(
    "kernel", [_shapes_kernel, _size_kernel, _number_kernel, _kinds_kernel, _pointers_kernel]
)
def test_errors_are_those_of_triton(own, kernel):
    def error() -> str:
        with pytest.raises(Exception) as raised:
            kernel[(1,)](torch.zeros(8, dtype=torch.int32))
        return f"{type(raised.value)} {raised.value}"

    ours = error()
    with own():
        assert ours == error()


def test_plans_and_attention_are_those_of_triton(own):
    packed = case("one_bar").structure

    def everything() -> list[torch.Tensor]:
        results = []
        for phase in PHASES:
            inputs = random_inputs(phase, packed, torch.float32, dim=32, heads=1)
            results += outputs_and_gradients(getattr(Backend(packed), phase), inputs)
        plan = Plan(packed).finalize()
        return [*results, plan.order, plan.table, plan.needs]

    ours = everything()
    with own():
        expected = everything()
    assert len(ours) == len(PHASES) + sum(map(len, INPUTS.values())) + 3
    assert all(map(torch.equal, ours, expected))
