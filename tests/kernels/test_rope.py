"""RoPE where queries and keys are split off: kernel and CPU formula against the definition in float64."""

import pytest
import torch

from meloformer.kernels.rope import split_and_rotate
from meloformer.model.layers import Rotary

from helpers.plan_cases import DEVICE

B, N, H = 2, 21, 3


def inputs(parts, dim, dtype, heads_first=False, duplicated=False):
    """A projection, tables, and gradients, which attention lays out in either order; with `duplicated`, of
    keys and values once more."""
    generator = torch.Generator().manual_seed(parts + dim)
    position = torch.randint(2000, (B, N), generator=generator)
    rotary = Rotary([(position, dim // 2, 10000.0)], torch.float64)
    x = torch.randn(B, N, parts, H, dim, generator=generator, dtype=torch.float64)
    number = parts + 2 * duplicated
    order = (number, B, H, N, dim) if heads_first else (number, B, N, H, dim)
    gradients = torch.randn(order, generator=generator, dtype=torch.float64)
    gradients = gradients if heads_first else gradients.transpose(2, 3)
    moved = (part.to(dtype).to(DEVICE) for part in (x, rotary.cos_BND, rotary.sin_BND, *gradients))
    x, cos, sin, *gradients = moved
    return x, cos, sin, gradients


def definition(x, cos, sin):
    half = x.shape[-1] // 2
    *rotated, values = x.unbind(2)
    angle = torch.complex(cos[..., :half], sin[..., :half])[:, :, None]
    for part in rotated:
        part = torch.complex(part[..., :half], part[..., half:]) * angle
        yield torch.cat([part.real, part.imag], dim=-1).transpose(1, 2)
    yield values.transpose(1, 2)


def gold(x, cos, sin, gradients):
    x = x.double().requires_grad_()
    outs = tuple(definition(x, cos.double(), sin.double()))
    outs += outs[-2:] if len(gradients) > len(outs) else ()
    return [*outs, *torch.autograd.grad(outs, x, [gradient.double() for gradient in gradients])]


def check(found, exact, dtype, roundings):
    """In the CPU formula both products are rounded before they are added."""
    for got, want in zip(found, exact, strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        size = want.abs().max()
        assert ((got - want).abs() <= roundings * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("dim", [8, 24, 64])
@pytest.mark.parametrize("duplicated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_split_and_rotate(parts, dim, duplicated, dtype):
    if dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("the kernel computes in float32")
    x, cos, sin, gradients = inputs(parts, dim, dtype, duplicated=duplicated)
    leaf = x.clone().requires_grad_()
    outs = split_and_rotate(leaf, cos, sin, duplicated)
    check([*outs, *torch.autograd.grad(outs, leaf, gradients)], gold(x, cos, sin, gradients), dtype, 3)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("dim", [8, 24, 64])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("duplicated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel(parts, dim, heads_first, duplicated, dtype):
    """In the interpreter, where there is no GPU."""
    from meloformer.kernels.rope_kernels import split_backward

    x, cos, sin, gradients = inputs(parts, dim, dtype, heads_first, duplicated)
    found = split_backward(gradients[:parts], gradients[parts:], cos, sin)
    check([found], gold(x, cos, sin, gradients)[-1:], dtype, 1)


@pytest.mark.parametrize("duplicated", [False, True])
def test_compiled(duplicated):
    x, cos, sin, gradients = inputs(3, 16, torch.float32, heads_first=True, duplicated=duplicated)
    leaf = x.clone().requires_grad_()
    outs = torch.compile(split_and_rotate, backend="aot_eager", fullgraph=True)(leaf, cos, sin, duplicated)
    found = [*outs, *torch.autograd.grad(outs, leaf, gradients)]
    check(found, gold(x, cos, sin, gradients), torch.float32, 3)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("duplicated", [False, True])
def test_opcheck(parts, duplicated):
    _, cos, sin, gradients = inputs(parts, 16, torch.float32, duplicated=duplicated)
    tests = "test_schema", "test_faketensor"  # it is a gradient
    args = gradients[:parts], gradients[parts:], cos, sin
    torch.library.opcheck(torch.ops.meloformer.split_backward, args, test_utils=tests)


def test_other_numbers_of_parts_are_refused():
    x, cos, sin, _ = inputs(3, 8, torch.float32)
    with pytest.raises(ValueError, match="got 1"):
        split_and_rotate(x[:, :, :1], cos, sin)


def test_tables_of_other_rows_are_refused():
    x, cos, sin, _ = inputs(3, 8, torch.float32)
    with pytest.raises(ValueError, match=r"expected tables .* \[2, 21, 8\], got \[1, 21, 8\]"):
        split_and_rotate(x, cos, sin[:1])


def test_second_gradients_are_refused():
    x, cos, sin, gradients = inputs(2, 8, torch.float32)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="split_and_rotate can be differentiated only once"):
        torch.autograd.grad(split_and_rotate(leaf, cos, sin), leaf, gradients, create_graph=True)
