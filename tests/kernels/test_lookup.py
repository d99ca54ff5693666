"""Sums of rows of a table: the kernels and the CPU formula against float64, and the same bits every time."""

import pytest
import torch

from meloformer.kernels.lookup import PART, find_readers, sum_of_rows

from helpers.plan_cases import DEVICE

# Rows of the table, channels, reads of a token, and the tokens.
SHAPES = [
    (5, 48, 2, (2, 7)),
    (300, 256, 9, (1, 40)),
    (9, 300, 3, (3, PART + 1)),
    (4, 16, 1, (0, 3)),
    (3, 8, 1, (1,)),
    (3, 8, 4, (10 * PART,)),  # more parts of one row than are added up at once
]


def inputs(number, width, reads, shape, dtype, seed=0):
    """The table, float32 or wider; rows, one of them half of all and the last never; the gradient."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(number, width, generator=generator, dtype=torch.float64)
    rows = torch.randint(0, number - 1, (reads, *shape), generator=generator)
    rows = torch.where(torch.rand(rows.shape, generator=generator) < 0.5, 1, rows)
    gradient = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    table = table.to(torch.promote_types(dtype, torch.float32))
    return table.to(DEVICE), rows.to(DEVICE), gradient.to(dtype).to(DEVICE)


def check(out, d_table, table, rows, gradient, computed_in):
    """Terms are rounded as weights are, sums as what they are computed in, and the result once."""
    dtype, number = gradient.dtype, len(table)
    terms = table.to(dtype).double()[rows]
    slack = (len(rows) + 2) * torch.finfo(computed_in).eps
    allowed = torch.finfo(dtype).eps * terms.sum(0).abs() + slack * terms.abs().sum(0)
    assert out.dtype == dtype and ((out - terms.sum(0)).abs() <= allowed).all()

    each = gradient.double().flatten(0, -2).repeat(len(rows), 1)
    exact, size = (
        torch.zeros(table.shape, dtype=torch.float64, device=DEVICE).index_add_(0, rows.flatten(), x)
        for x in (each, each.abs())
    )
    readers = rows.flatten().bincount(minlength=number).max() if rows.numel() else 0
    assert d_table.dtype == table.dtype
    allowed = torch.finfo(table.dtype).eps * (readers + 8) ** 0.5 * size
    assert ((d_table - exact).abs() <= allowed).all()
    assert not d_table[-1].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ahead", [False, True])
def test_operator(shape, dtype, ahead):
    if dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("the kernels compute in float32")
    table, rows, gradient = inputs(*shape, dtype)
    table.requires_grad_()
    out = sum_of_rows(table, rows, dtype, find_readers(rows, len(table)) if ahead else None)
    (d_table,) = torch.autograd.grad(out, table, gradient)
    computed_in = dtype if DEVICE == "cpu" else torch.float32
    check(out.detach(), d_table, table.detach(), rows, gradient, computed_in)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed", [1, 2])
def test_kernels(shape, dtype, seed):
    """In the interpreter, where there is no GPU."""
    from meloformer.kernels import lookup_kernels

    table, rows, gradient = inputs(*shape, dtype, seed)
    out = lookup_kernels.forward(table.to(dtype), rows)
    readers = find_readers(rows, len(table))
    again = lookup_kernels.backward(gradient, readers, PART, len(table), table.dtype)
    d_table = lookup_kernels.backward(gradient, readers, PART, len(table), table.dtype)
    assert torch.equal(d_table, again)
    check(out, d_table, table, rows, gradient, computed_in=torch.float32)


def test_readers_of_a_row_are_all_that_read_it_in_order():
    rows = torch.tensor([[2, 0, 2], [2, 3, 2]], device=DEVICE)
    reader, first, part, row = find_readers(rows, 5)
    assert reader.tolist() == [1, 0, 2, 0, 2, 1] and first.tolist() == [0, 1, 1, 5, 6, 6]
    assert part.tolist() == [0, 1, 1, 2, 3, 3]
    assert row[:3].tolist() == [0, 2, 3] and row[3:].eq(5).all()


def test_a_row_of_many_readers_is_cut_into_parts():
    rows = torch.full((1, 3 * PART + 1), 1, device=DEVICE)
    _, first, part, row = find_readers(rows, 3)
    assert first.tolist() == [0, 0, 3 * PART + 1, 3 * PART + 1] and part.tolist() == [0, 0, 4, 4]
    assert row[:4].tolist() == [1] * 4 and row[4:].eq(3).all()


def test_a_table_too_long_for_narrow_keys():
    number = torch.iinfo(torch.int16).max + 2
    rows = torch.tensor([[number - 1, 0, number - 1]], device=DEVICE)
    reader, first, _, row = find_readers(rows, number)
    assert reader.tolist() == [1, 0, 2] and first[-2:].tolist() == [1, 3]
    assert row[:2].tolist() == [0, number - 1]


def test_gradients_are_summed_in_the_precision_of_the_table():
    """In bfloat16 a sum of thousands of like numbers stands still."""
    table = torch.randn(7, 2, device=DEVICE, requires_grad=True)
    rows = torch.tensor([[1] * 5000 + [2], [6] * 5000 + [3]], device=DEVICE)
    out = sum_of_rows(table, rows, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    out.backward(torch.full_like(out, 0.5))
    assert table.grad.tolist() == [[0, 0], [2500, 2500], [0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0], [2500, 2500]]


@pytest.mark.parametrize("kernels", [False, True])
def test_the_gradient_has_the_dtype_of_the_table(kernels):
    from meloformer.kernels import lookup_kernels

    table, rows, gradient = inputs(5, 16, 2, (3, 4), torch.float32)
    table = table.half().requires_grad_()
    if kernels:
        found = lookup_kernels.backward(gradient, find_readers(rows, 5), PART, 5, torch.float16)
    else:
        (found,) = torch.autograd.grad(sum_of_rows(table, rows, torch.float32), table, gradient)
    exact = torch.zeros(5, 16, device=DEVICE)
    exact.index_add_(0, rows.flatten(), gradient.flatten(0, -2).repeat(2, 1))
    torch.testing.assert_close(found, exact.half(), rtol=1e-3, atol=1e-3)


def test_second_gradients_are_refused():
    table = torch.randn(3, 2, device=DEVICE, requires_grad=True)
    out = sum_of_rows(table, torch.tensor([[1, 2]], device=DEVICE), torch.float32)
    with pytest.raises(RuntimeError, match="sum_of_rows can be differentiated only once"):
        torch.autograd.grad(out.sum(), table, create_graph=True)


def test_opcheck():
    table, rows, gradient = inputs(5, 16, 2, (3, 4), torch.float32)
    torch.library.opcheck(torch.ops.meloformer.sum_of_rows, (table, rows))
    readers = [*find_readers(rows, 5)]
    backward = torch.ops.meloformer.sum_of_rows_backward
    torch.library.opcheck(backward, (gradient, rows, readers, 5, table.dtype))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_float64_is_refused():
    rows = torch.tensor([[1, 2]], device=DEVICE)
    for table, dtype in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        with pytest.raises(ValueError, match="float64 would not be what it says"):
            sum_of_rows(torch.zeros(3, 16, dtype=table, device=DEVICE), rows, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gradients_are_the_same_bits_every_time():
    """As many tokens as in training: sums by atomics would differ."""
    table, rows, gradient = inputs(5000, 512, 9, (4, 24576), torch.bfloat16)
    readers = find_readers(rows, len(table))
    found = []
    for each in (readers, readers, None):
        table.grad = None
        sum_of_rows(table.requires_grad_(), rows, torch.bfloat16, each).backward(gradient)
        found.append(table.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    out = sum_of_rows(table, rows, torch.bfloat16).detach()
    check(out, found[0], table.detach(), rows, gradient, computed_in=torch.float32)
