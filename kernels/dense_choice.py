"""Which dense attention is the fastest here, for documents as long as those of a batch: measured.

A training step attends forward and backward in every layer, over documents of new lengths. So that is what
is timed, the host included: cuDNN, for one, prepares itself for every new length.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .dense import CausalAttention
from .structure import Structure

MEASURED = ("flash", "fa3", "cudnn")  # of equally fast ones the first is taken
_TRIALS = 4  # the first of which is not counted


def fastest_way(
    structure: Structure, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, layers: int
) -> tuple[str | None, dict[str, float | str]]:
    """The fastest of `MEASURED` and, for each, its milliseconds of a step or why it cannot run.

    "each", which runs anywhere, if none of them does. FlashAttention-3 stays activated in PyTorch if it is
    the fastest. (None, {}) off CUDA and in float32, where nothing is to choose; ("flash", {}) if PyTorch must
    be deterministic, since times are not.

    Args:
        structure: of a batch. If it is on CUDA, this synchronizes.
        layers: how often a batch is attended to.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None, {}
    if torch.are_deterministic_algorithms_enabled():
        return "flash", {}
    found = measured(
        structure, heads, head_dim, dtype, device, layers, lambda: torch.cuda.synchronize(device)
    )
    fastest = choose(found) or "each"
    if fastest == "fa3":
        _activate_fa3()
    return fastest, found


def measured(
    structure: Structure,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    layers: int,
    wait: Callable[[], None],
) -> dict[str, float | str]:
    """Of each of `MEASURED`; see `fastest_way`. `wait` returns when the device has finished."""
    shape = (*structure.doc.shape, heads, head_dim)
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, device=device, generator=generator) for _ in range(4)]
    inputs = [x.to(dtype).transpose(1, 2) for x in inputs]
    found: dict[str, float | str] = {}
    for way in MEASURED:

        def make(trial: int, way: str = way) -> CausalAttention:
            return CausalAttention(lengthened(structure, trial), device, way)

        try:
            with _activated(way):
                found[way] = milliseconds_of_a_step(make, inputs, layers, wait)
        except Exception as error:  # whatever is raised by a way that this GPU or this PyTorch lacks
            found[way] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def choose(found: dict[str, float | str]) -> str | None:
    """The way of the fewest milliseconds; None if none can run."""
    times = {way: ms for way, ms in found.items() if not isinstance(ms, str)}
    return min(times, key=times.__getitem__) if times else None


def milliseconds_of_a_step(
    make: Callable[[int], Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    layers: int,
    wait: Callable[[], None],
) -> float:
    """Median over trials of the time that forward and backward of all layers take.

    Args:
        make: the attention of a trial, by its number; not timed.
        inputs: q, k, v and a cotangent, [B, H, N, D] each.
        wait: returns when the device has finished.
    """
    *qkv, cotangent = inputs
    qkv = [x.detach().requires_grad_() for x in qkv]
    spent = []
    for trial in range(_TRIALS):
        attention = make(trial)
        wait()
        begun = time.perf_counter()
        with torch.enable_grad():
            for _ in range(layers):
                torch.autograd.grad(attention(*qkv), qkv, cotangent)
        wait()
        spent.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(spent[1:])


def lengthened(structure: Structure, by: int) -> Structure:
    """Of the same rows, each document `by` tokens longer at the cost of the last ones of the row."""
    docs = []
    for row in structure.doc:
        lengths = torch.unique_consecutive(row, return_counts=True)[1]
        lengths[:-1] += by
        ends = lengths.cumsum(0).clamp(max=len(row))
        numbers = torch.arange(len(ends), device=row.device)
        docs.append(numbers.repeat_interleave(ends.diff(prepend=ends.new_zeros(1))))
    return replace(structure, doc=torch.stack(docs))


def _activate_fa3() -> None:
    from torch.nn.attention import activate_flash_attention_impl  # since PyTorch 2.11

    activate_flash_attention_impl("FA3")


@contextmanager
def _activated(way: str) -> Iterator[None]:
    if way != "fa3":
        yield
        return
    _activate_fa3()
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()
