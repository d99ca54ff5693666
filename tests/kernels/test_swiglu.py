"""The SwiGLU operator: its kernels and its CPU formula against the definition in float64."""

import pytest
import torch

from meloformer.kernels.swiglu import swiglu

from helpers.plan_cases import DEVICE

SHAPES = [(7, 48), (2, 3, 2 * 1040), (0, 32)]


def definition(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def inputs(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate_up = 3 * torch.randn(shape, generator=generator)
    gradient = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator)
    return gate_up.to(dtype).to(DEVICE), gradient.to(dtype).to(DEVICE)


def gold(gate_up, gradient):
    x = gate_up.double().requires_grad_()
    out = definition(x)
    return out.detach(), torch.autograd.grad(out, x, gradient.double())[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operator(shape, dtype):
    if dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("the kernels compute in float32")
    gate_up, gradient = inputs(shape, dtype)
    x = gate_up.clone().requires_grad_()
    out = swiglu(x)
    (dx,) = torch.autograd.grad(out, x, gradient)
    _check((out, dx), gate_up, gradient, computed_in=dtype if DEVICE == "cpu" else torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels(shape, dtype):
    """In the interpreter, where there is no GPU. They round their results alone."""
    from meloformer.kernels import swiglu_kernels

    gate_up, gradient = inputs(shape, dtype, seed=1)
    found = swiglu_kernels.forward(gate_up), swiglu_kernels.backward(gate_up, gradient)
    _check(found, gate_up, gradient, computed_in=torch.float32)


def _check(found, gate_up, gradient, computed_in):
    """Each result is rounded once, after some six operations whose terms may cancel each other."""
    gate, up = gate_up.double().abs().chunk(2, dim=-1)
    slope = gradient.double().abs() * (1 + gate)
    terms = gate * up, torch.cat([slope * up, slope], dim=-1)
    for got, exact, size in zip(found, gold(gate_up, gradient), terms):
        assert got.shape == exact.shape and got.dtype == gate_up.dtype
        allowed = torch.finfo(got.dtype).eps * exact.abs() + 6 * torch.finfo(computed_in).eps * size
        assert ((got - exact).abs() <= allowed + torch.finfo(got.dtype).tiny).all()


def test_other_strides_and_compiled():
    gate_up, gradient = inputs((6, 64), torch.float32)
    x = gate_up.t().contiguous().t().requires_grad_()
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)(x)
    (dx,) = torch.autograd.grad(compiled, x, gradient)
    _check((compiled, dx), x.detach(), gradient, computed_in=torch.float32)


def test_second_gradients_are_refused():
    x = inputs((2, 8), torch.float32)[0].requires_grad_()
    with pytest.raises(RuntimeError, match="swiglu can be differentiated only once"):
        torch.autograd.grad(swiglu(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("turned", [False, True])
def test_opcheck(turned):
    gate_up, gradient = inputs((8, 16), torch.float32)
    gradient = gradient.contiguous()
    if turned:
        gate_up, gradient = gate_up.t().contiguous().t(), gradient.t().contiguous().t()
    torch.library.opcheck(torch.ops.meloformer.swiglu, (gate_up.requires_grad_(),))
    torch.library.opcheck(torch.ops.meloformer.swiglu_backward, (gate_up.detach(), gradient))


def test_gate_and_up_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="got 7 of both"):
        swiglu(torch.zeros(3, 7, device=DEVICE))
