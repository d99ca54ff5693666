"""The sum of several rows of a table as a PyTorch operator: what a token's id and input features embed to.

PyTorch's embeddings would gather once for every feature, and add the results one after the other; for their
gradient the ids of each feature would be sorted. Here all tables are one, so there is one pass in the
forward, and one sort for the backward, which can be made ahead (`find_readers`): it depends on ids alone.
Sums are always in the same order.

Shape suffixes in comments: R rows of the table, K of them for each of T tokens, E channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .operators import refuse_second_gradients, register

PART = 256  # readers of a row whose gradients one program adds up


class Readers(NamedTuple):
    """Which tokens read each row: what the gradient of the table needs on CUDA. Int64 all.

    Attributes:
        reader: [K T] tokens, sorted by the row that they read; K times each.
        first: [R + 1] where the readers of each row begin in it, and the end.
        part: [R + 1] the readers of a row are divided into parts of `PART`: the number of its first, and the
            end.
        row: [parts] the row of each part; R where there is no such part.
    """

    reader: Tensor
    first: Tensor
    part: Tensor
    row: Tensor


@torch.no_grad()
def find_readers(rows: Tensor, number: int) -> Readers:
    """For `sum_of_rows` of these `rows` of a table of `number` rows; it never synchronizes with the host."""
    # The sort of the CUDA library takes a pass for every byte of a key.
    narrow = torch.int16 if number < torch.iinfo(torch.int16).max else torch.int32
    row, place = rows.flatten().to(narrow).sort(stable=True)
    first = torch.searchsorted(row, torch.arange(number + 1, device=rows.device, dtype=narrow))
    parts = (first.diff() + (PART - 1)) // PART
    part = torch.nn.functional.pad(parts.cumsum(0), (1, 0))
    most = -(-rows.numel() // PART) + number
    numbers = torch.arange(most, device=rows.device)
    reader = place % max(rows[0].numel(), 1)
    return Readers(reader, first, part, torch.searchsorted(part, numbers, right=True) - 1)


def sum_of_rows(table: Tensor, rows: Tensor, dtype: torch.dtype, readers: Readers | None = None) -> Tensor:
    """sum over k of table[rows[k]]: [..., E], in `dtype`.

    The table is rounded to `dtype` first, as weights are before a product; on CUDA, sums are then computed in
    float32 and rounded once. The gradient is summed in float32 or wider, and in the dtype of the table:
    thousands of tokens share one row, and a sum of so many in bfloat16 stands still.

    Args:
        table: [R, E]
        rows: int64 [K, ...], 0 to R - 1.
        readers: what `find_readers(rows, R)` returned, if it was called ahead.

    Raises:
        ValueError: float64 on CUDA.
        RuntimeError: in the backward, with create_graph.
    """
    if table.is_cuda and torch.float64 in (table.dtype, dtype):
        raise ValueError("sum_of_rows computes in float32 on CUDA: float64 would not be what it says")
    return _SumOfRows.apply(table, rows, dtype, readers)


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor, dtype: torch.dtype, readers: Readers | None) -> Tensor:
        ctx.save_for_backward(rows, *(readers or ()))
        ctx.number, ctx.dtype = len(table), table.dtype
        return torch.ops.meloformer.sum_of_rows(table.to(dtype), rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_gradients("sum_of_rows")
        rows, *readers = ctx.saved_tensors
        into = torch.ops.meloformer.sum_of_rows_backward(gradient, rows, readers, ctx.number, ctx.dtype)
        return into, None, None, None


def _cpu(table: Tensor, rows: Tensor) -> Tensor:
    first, *others = (torch.nn.functional.embedding(row, table) for row in rows)
    for other in others:
        first += other
    return first


def _cpu_backward(
    gradient: Tensor, rows: Tensor, readers: list[Tensor], number: int, dtype: torch.dtype
) -> Tensor:
    width = gradient.shape[-1]
    each = gradient.to(torch.promote_types(dtype, torch.float32)).reshape(-1, width)
    total = each.new_zeros(number, width)
    for row in rows:
        total.index_add_(0, row.flatten(), each)
    return total.to(dtype)


def _cuda(table: Tensor, rows: Tensor) -> Tensor:
    from .lookup_kernels import forward  # imports triton

    return forward(table.contiguous(), rows.contiguous())


def _cuda_backward(
    gradient: Tensor, rows: Tensor, readers: list[Tensor], number: int, dtype: torch.dtype
) -> Tensor:
    from .lookup_kernels import backward

    return backward(gradient.contiguous(), readers or find_readers(rows, number), PART, number, dtype)


def _fake(table: Tensor, rows: Tensor) -> Tensor:
    return table.new_empty(*rows.shape[1:], table.shape[-1])


def _fake_backward(
    gradient: Tensor, rows: Tensor, readers: list[Tensor], number: int, dtype: torch.dtype
) -> Tensor:
    return gradient.new_empty(number, gradient.shape[-1], dtype=dtype)


register("sum_of_rows(Tensor table, Tensor rows) -> Tensor", _fake, _cpu, _cuda)
register(
    "sum_of_rows_backward(Tensor gradient, Tensor rows, Tensor[] readers, int number, ScalarType dtype)"
    " -> Tensor",
    *(_fake_backward, _cpu_backward, _cuda_backward),
)
