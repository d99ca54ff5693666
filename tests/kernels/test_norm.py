"""RMSNorm of streams: its kernels and its CPU formula against the definition in float64."""

import pytest
import torch

from meloformer.kernels.norm import rms_norm, rms_norm_of_stream, rms_norm_of_streams

from helpers.plan_cases import DEVICE

EPS = 0.1  # beside squares of about 1: who forgets it is found out
SHAPES = [[(5, 48)], [(2, 9, 512)], [(1, 1100)], [(0, 32)], [(2, 9, 64), (2, 1, 64)], [(17, 256), (0, 256)]]


def inputs(shapes, dtype, adds, seed=0):
    """Streams, what is added to them, the gain (float32 or wider), the gradients of the results."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = shapes[0][-1]
    rows = sum(randn(*shape).numel() for shape in shapes) // width
    streams, gradients = ([randn(*shape) for shape in shapes] for _ in range(2))
    for x in streams:
        x.view(-1, width)[:1] *= 1e-3  # a row of which eps decides
    added = [randn(*shape) for shape in shapes] if adds else []
    gradients.append(randn(rows, width))
    gain = (1 + 0.3 * randn(width)).to(torch.promote_types(dtype, torch.float32)).to(DEVICE)
    streams, added, gradients = (
        [x.to(dtype).to(DEVICE) for x in part] for part in (streams, added, gradients)
    )
    return streams, added, gain, gradients


def gold(streams, added, gain, gradients):
    """Streams, norm, and the gradients of the streams (so of what is added) and of the gain, in float64."""
    streams, gain = [x.double().requires_grad_() for x in streams], gain.double().requires_grad_()
    sums = [x + more for x, more in zip(streams, added)] if added else streams
    x = torch.cat([part.flatten(0, -2) for part in sums])
    outs = *sums, x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain
    return [*outs, *torch.autograd.grad(outs, (*streams, gain), [g.double() for g in gradients])]


def called(streams, added, gain):
    """The public function for so many streams."""
    if len(streams) == 1:
        return rms_norm_of_stream(streams[0], gain, EPS, *added)
    return rms_norm_of_streams(streams[0], added[0], streams[1], added[1], gain, EPS)


def check(found, exact, dtype, computed_in):
    """What is rounded once errs by its last place; sums in between by that of what they are computed in.

    A stream is rounded before it is normed: that moves the norm and its gradient by as much again.
    """
    for got, want in zip(found, exact, strict=True):
        assert got.shape == want.shape
        eps = max(torch.finfo(t).eps for t in (got.dtype, dtype, computed_in))
        scale = want.abs().max() if want.numel() else 1
        assert ((got - want).abs() <= 2 * eps * (want.abs() + scale)).all()


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_streams_and_norm(shapes, adds, dtype):
    if dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("the kernels compute in float32")
    if len(shapes) == 2 and not adds:
        pytest.skip("two streams have something added")
    streams, added, gain, gradients = inputs(shapes, dtype, adds)
    leaves = [part.requires_grad_() for part in (*streams, *added, gain)]
    outs = called(streams, added, gain)
    *d_leaves, d_gain = torch.autograd.grad(outs, leaves, gradients)
    assert all(out.dtype == dtype for out in outs)
    exact = gold(streams, added, gain, gradients)
    check([*outs, *d_leaves[: len(streams)], d_gain], exact, dtype, gain.dtype)
    for d_stream, d_added in zip(d_leaves, d_leaves[len(streams) :]):
        assert torch.equal(d_stream, d_added)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels(shapes, adds, dtype, monkeypatch):
    """In the interpreter, where there is no GPU. Few programs, so that each takes several steps."""
    from meloformer.kernels import norm_kernels

    monkeypatch.setattr(norm_kernels, "_PROGRAMS", 2)
    monkeypatch.setattr(norm_kernels, "_TILE", 1024)
    streams, added, gain, gradients = inputs(shapes, dtype, adds, seed=1)
    *sums, normed = norm_kernels.forward(streams, added, gain, EPS)
    *d_streams, d_normed = gradients
    found = norm_kernels.backward(d_normed, d_streams, sums or streams, gain, EPS)
    exact = gold(streams, added, gain, gradients)
    check([*(sums or streams), normed, *found], exact, dtype, torch.float32)


@pytest.mark.parametrize("kernels", [False, True])
def test_the_norm_alone(kernels):
    (x,), _, gain, (_, gradient) = inputs([(3, 64)], torch.float32, False, seed=2)
    exact = gold([x], [], gain, (torch.zeros_like(x), gradient))[1:]
    if kernels:
        from meloformer.kernels import norm_kernels

        (normed,) = norm_kernels.forward([x], [], gain, EPS)
        gradients = norm_kernels.backward(gradient, [], [x], gain, EPS)
    else:
        x, gain = x.requires_grad_(), gain.requires_grad_()
        normed = rms_norm(x, gain, EPS)
        gradients = torch.autograd.grad(normed, (x, gain), gradient)
    check((normed, *gradients), exact, torch.float32, torch.float32)


@pytest.mark.parametrize("adds", [False, True])
def test_compiled_and_in_other_strides(adds):
    (x,), added, gain, gradients = inputs([(6, 64)], torch.float32, adds, seed=3)
    exact = gold([x], added, gain, gradients)
    x = x.t().contiguous().t().requires_grad_()
    gradients = [gradient.t().contiguous().t() for gradient in gradients]
    compiled = torch.compile(rms_norm_of_stream, backend="aot_eager", fullgraph=True)
    outs = compiled(x, gain.requires_grad_(), EPS, *added)
    check([*outs, *torch.autograd.grad(outs, (x, gain), gradients)], exact, torch.float32, torch.float32)


def test_a_vector_and_a_row_of_zeros():
    x = torch.randn(8)
    torch.testing.assert_close(rms_norm(x, torch.ones(8), EPS), x / (x.square().mean() + EPS).sqrt())
    zeros = torch.zeros(2, 8, requires_grad=True)
    rms_norm(zeros, torch.ones(8), EPS).sum().backward()
    torch.testing.assert_close(zeros.grad, torch.full((2, 8), EPS**-0.5))


def test_what_does_not_belong_together_is_refused():
    """The kernels would read beyond it."""
    x, gain = torch.zeros(4, 48), torch.ones(48)
    for call, says in (
        (lambda: rms_norm(x, gain[:16], EPS), "gain of 48 channels, got .16."),
        (lambda: rms_norm_of_stream(x, gain, EPS, x[0]), "cannot add .48. to a stream .4, 48."),
        (lambda: rms_norm_of_stream(x, gain, EPS, x.half()), "share dtype and channels, got torch.float16"),
        (lambda: rms_norm_of_streams(x, x, x[:, :16], x[:, :16], gain, EPS), "got torch.float32 .4, 16."),
        (lambda: rms_norm(x, gain, 0.0), "eps must be positive"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_second_gradients_are_refused():
    (x,), _, gain, _ = inputs([(2, 8)], torch.float32, False)
    with pytest.raises(RuntimeError, match="rms_norm can be differentiated only once"):
        torch.autograd.grad(rms_norm(x.requires_grad_(), gain, EPS).sum(), x, create_graph=True)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_opcheck(turned, adds):
    streams, added, gain, (*d_streams, d_normed) = inputs([(8, 16), (2, 4, 16)], torch.float32, adds)
    if turned:
        streams, added, d_streams = (
            [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in part]
            for part in (streams, added, d_streams)
        )
    ops = torch.ops.meloformer
    tests = "test_schema", "test_faketensor"  # their gradients are those of `rms_norm_of_stream`
    torch.library.opcheck(ops.rms_norm, (streams, added, gain, EPS), test_utils=tests)
    for some in ([], d_streams):
        torch.library.opcheck(ops.rms_norm_backward, (d_normed, some, streams, gain, EPS), test_utils=tests)
