"""Registers the project's PyTorch operators, and refuses second gradients: the same way for all of them."""

from collections.abc import Callable

import torch

_library = torch.library.Library("meloformer", "DEF")


def register(schema: str, fake: Callable, cpu: Callable, cuda: Callable) -> None:
    """Makes `torch.ops.meloformer.NAME` of an operator that runs on the CPU and on CUDA.

    Args:
        schema: "NAME(arguments) -> results", in PyTorch's notation.
        fake: what it returns, in shape, strides and dtype, for tensors without data.
        cpu, cuda: what computes it on each device.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"meloformer::{name}", fake, lib=_library)


def register_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    """Makes operator `name` differentiable once, as a `torch.autograd.Function` of these two would be."""

    def backward_once(ctx, *gradients):
        refuse_second_gradients(name)
        return backward(ctx, *gradients)

    qualified = f"meloformer::{name}"
    torch.library.register_autograd(qualified, backward_once, setup_context=setup_context, lib=_library)


def refuse_second_gradients(name: str) -> None:
    """Call it first in a backward whose result is not differentiable.

    PyTorch enables gradients in a backward only with `create_graph`, and when it traces one to compile it.
    The former is refused whether or not anything is differentiated twice later.

    Raises:
        RuntimeError: called with `create_graph`.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} can be differentiated only once: create_graph is not supported")
