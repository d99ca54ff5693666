"""The Triton backend against the float64 oracle: interpreted on CPU in float32, compiled on a GPU."""

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from meloformer.kernels import make_attention, ops, triton_backend
from meloformer.kernels.launch import TABLE, Launch, Launches, override, untuned
from meloformer.kernels.plan import Plan
from meloformer.kernels.structure import KIND_RULE
from meloformer.kernels.triton_backend import Backend
from meloformer.model.loss import next_token_loss
from meloformer.model.transformer import SIZES, MeloFormer, ModelConfig

from helpers.attention_cases import (
    CASES,
    FULL_COLUMNS,
    INPUTS,
    NEW_RULES,
    ORIGINAL,
    PHASES,
    case,
    check_low_precision,
    check_padding,
    dense_case,
    outputs_and_gradients,
    plain_attention,
    plain_phase,
    random_inputs,
    song,
    structure,
)
from helpers.fake_gpu import gpu_of
from helpers.model_cases import keep_embeddings
from helpers.plan_cases import DEVICE, PlanOfMasks

gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")]


@pytest.fixture(autouse=True)
def poison_uninitialized_memory(monkeypatch):
    """torch.empty then holds NaN, and the largest number in integer tensors."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # or cuBLAS refuses the oracle on CUDA
    yield
    torch.use_deterministic_algorithms(False)


def check(function, plain, inputs, names, tolerance=4e-6):
    """float32, to a few roundings of the largest value."""
    expected = outputs_and_gradients(plain, [x.double() for x in inputs])
    for what, a, b in zip(names, outputs_and_gradients(function, inputs), expected):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * max(1, b.abs().max()), msg=what)


def check_phase(masks, phase, dim=32, heads=1, split=0):
    placed = masks._replace(structure=masks.structure.to(DEVICE))
    inputs = random_inputs(phase, placed.structure, torch.float32, dim=dim, heads=heads)
    backend = Backend(placed.structure)
    if phase == "update":
        backend.plan = Plan(placed.structure, split)
    check(getattr(backend, phase), plain_phase(phase, placed), inputs, ("o", *INPUTS[phase]))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, phase):
    check_phase(case(name), phase, split=1)


@pytest.mark.parametrize("kind_rule", NEW_RULES)
def test_kind_rules(kind_rule):
    check_phase(case("documents", kind_rule=kind_rule), "update", split=1)


def test_the_next_launch_finds_the_counters_of_split_blocks_as_zeros(monkeypatch):
    made, update = [], ops.Update

    def keep(inputs, plan):
        made.append(update(inputs, plan))
        return made[-1]

    monkeypatch.setattr(ops, "Update", keep)
    check_phase(case("documents"), "update", split=1)
    assert len(made) >= 2 and all(len(run.counters) > 0 and not run.counters.any() for run in made)


LAUNCHES = {
    "small": Launches.all(Launch(16, 32)),
    "half": Launches.all(Launch(32, 64)),
    "untuned, half": untuned(gpu_of(120), 32, 2),
    "untuned": untuned(gpu_of(86), 32, 4),
    **{f"{e.gpu} {e.head_dim} x {e.itemsize}": e.launches for e in TABLE},
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_launch(name):
    with override(LAUNCHES[name]):
        check_phase(case("documents"), "update", heads=2, split=2)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dim", [64, 128])
def test_head_dims(dim, phase):
    check_phase(case("documents"), phase, dim=dim)


@pytest.mark.parametrize("most", [1, 4, 16])
def test_any_number_of_summaries_in_a_program(most, monkeypatch):
    for name, value in (("MOST", most), ("PROGRAMS", 1)):
        monkeypatch.setattr(ops, f"_FORWARD_{name}", value)
        monkeypatch.setattr(ops, f"_BACKWARD_{name}", value)
    for name in ("documents", "rows"):
        check_phase(case(name), "summarize", heads=2)


@pytest.mark.parametrize("phase", PHASES)
def test_every_element_of_the_results_is_written(phase, monkeypatch):
    """That of padding too, whatever memory held before."""
    empty_like = ops._empty_like
    monkeypatch.setattr(ops, "_empty_like", lambda x: empty_like(x).fill_(float("nan")))
    monkeypatch.setattr(ops, "_PADDING", 16)
    check_phase(case("rows"), phase, heads=2)


class TestAnyMask:
    """The update kernels know bits, not music."""

    SUMMARIES, REGULAR = 13, 150

    def check(self, near, far, split=2, dim=32, heads=2):
        far[:, :, : self.SUMMARIES] = False
        far &= ~near
        plan = PlanOfMasks(near, far, self.SUMMARIES, split)
        generator = torch.Generator().manual_seed(1)
        rows, n, m = len(near), self.REGULAR, self.SUMMARIES
        inputs = [
            torch.randn(rows, heads, length, dim, generator=generator).to(DEVICE)
            for length in (n, m, m, n, n, n)
        ]

        def plain(q, ks, vs, kr, vr):
            return plain_attention(q, torch.cat([ks, kr], 2), torch.cat([vs, vr], 2), (near | far).to(DEVICE))

        def ours(*arguments):
            return torch.ops.meloformer.update(*arguments, *plan.tensors)[0]

        check(ours, plain, inputs, ("o", "q", "k_s", "v_s", "k_r", "v_r"))

    def dice(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(2, self.REGULAR, self.SUMMARIES + self.REGULAR, generator=generator)

    @pytest.mark.parametrize("columns", [32, 64])
    @pytest.mark.parametrize("density", [0, 0.01, 0.5, 1])
    def test_random_masks(self, density, columns):
        near = self.dice() < density
        near[0, 3] = False  # a blind query
        near[1, :, 40] = False  # a key that nobody sees
        with override(Launches.all(Launch(64, columns))):
            self.check(near, torch.zeros_like(near))

    @pytest.mark.parametrize("columns", [32, 64])
    @pytest.mark.parametrize("rows", [16, 64])
    def test_split_lines_of_full_tiles(self, rows, columns, monkeypatch):
        """Five and more tiles per line, most of them full, cut into parts in each pass."""
        monkeypatch.setattr(type(self), "REGULAR", 270)
        everything = torch.ones(1, 270, self.SUMMARIES + 270, dtype=torch.bool)
        far = everything.clone()
        with override(Launches.all(Launch(rows, columns))):
            self.check(everything, far.clone() & False, split=3, heads=1)
            self.check(everything & False, far, split=3, heads=1)

    @pytest.mark.parametrize("seed", range(3))
    def test_two_passes_continue_each_other(self, seed):
        dice = self.dice(seed)
        near, far = dice < 0.2, dice > 0.7
        near[:, 5:9], far[:, 8:12] = False, False
        near[:, 20:90, 60:] = False
        far[:, :, 50:] = True
        self.check(near, far, split=1)


def test_full_tiles():
    packed = structure(FULL_COLUMNS)
    assert Plan(packed.to(DEVICE)).statistics()["full"] > 0
    check_phase(dense_case(packed), "update")


@pytest.mark.parametrize("phase", PHASES)
def test_padding_gets_zero_and_matters_to_nobody(phase):
    packed = case("rows").structure.to(DEVICE)
    check_padding(getattr(Backend(packed), phase), phase, packed, dim=32)


@pytest.mark.parametrize("phase", PHASES)
def test_any_strides(phase):
    """As the model makes them (heads inside), channels not contiguous, rows expanded, odd offsets."""
    packed = case("rows").structure.to(DEVICE)
    inputs = random_inputs(phase, packed, torch.float32, dim=32)
    q, k, v, k2, v2, cotangent = inputs
    attend = getattr(Backend(packed), phase)
    expected = outputs_and_gradients(attend, inputs)
    joint = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)  # [B, N, 3, H, D]
    views = [*joint.permute(2, 0, 3, 1, 4).unbind(0)]
    views += [k2.mT.contiguous().mT, torch.nn.functional.pad(v2, (1, 0))[..., 1:]]
    views.append(cotangent.transpose(1, 2).contiguous().transpose(1, 2))
    for a, b in zip(outputs_and_gradients(attend, views), expected):
        assert torch.equal(a, b)


def test_tokens_begin_at_multiples_of_16_bytes():
    """What `tiles.key_pointers` tells the compiler; a batch or a length of 1 has any stride."""
    x = torch.zeros(2, 5, 3, 4, 32).transpose(2, 3)[..., 0].mT  # [2, 5, 3, 4] of channels 128 bytes apart
    assert ops._addressable(x).is_contiguous()
    usual = torch.zeros(1, 6, 2, 32).transpose(1, 2)
    odd = torch.zeros(1, 6, 2, 33)[..., 1:].transpose(1, 2)
    shifted = torch.zeros(1 + 6 * 2 * 32)[1:].view(1, 6, 2, 32).transpose(1, 2)
    single = torch.zeros(1, 1, 1, 32).as_strided((1, 1, 1, 32), (3, 5, 7, 1))
    for x, kept in ((usual, True), (odd, False), (shifted, False), (single, True)):
        found = ops._addressable(x)
        assert (found is x) is kept and torch.equal(found, x)
        assert found.data_ptr() % 16 == 0


def test_the_output_joins_its_heads_for_free():
    packed = case("rows").structure.to(DEVICE)
    *arguments, _ = random_inputs("update", packed, torch.float32, dim=32)
    assert Backend(packed).update(*arguments).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("phase", PHASES)
def test_results_repeat_bit_by_bit(phase):
    packed = case("documents").structure.to(DEVICE)
    inputs = random_inputs(phase, packed, torch.float32, dim=32)
    function = getattr(Backend(packed), phase)
    first, second = (outputs_and_gradients(function, inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [
        (48, torch.float32, r"\(32, 64, 128\) channels per head, got 48"),
        (32, torch.float64, "got torch.float64"),
    ],
    ids=["head_dim", "float64"],
)
def test_what_it_cannot_compute_is_refused(dim, dtype, message):
    packed = case("one_bar").structure.to(DEVICE)
    *arguments, _ = random_inputs("update", packed, dtype, dim=dim)
    with pytest.raises(ValueError, match=message):
        Backend(packed).update(*arguments)


def test_bfloat16_is_refused_by_the_interpreter():
    if DEVICE == "cuda":
        pytest.skip("compiled here")
    packed = case("one_bar").structure
    *arguments, _ = random_inputs("update", packed, torch.bfloat16, dim=32)
    with pytest.raises(ValueError, match="bfloat16 wrongly"):
        Backend(packed).update(*arguments)


@pytest.mark.parametrize("phase", PHASES)
def test_results_that_were_laid_out_anew(phase):
    """As saved_tensors_hooks may do between forward and backward."""
    packed = case("one_bar").structure.to(DEVICE)
    inputs = random_inputs(phase, packed, torch.float32, dim=32)
    attend = getattr(Backend(packed), phase)
    expected = outputs_and_gradients(attend, inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        got = outputs_and_gradients(attend, inputs)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("phase", PHASES)
def test_second_gradients_are_refused(phase):
    packed = case("one_bar").structure.to(DEVICE)
    *arguments, _ = random_inputs(phase, packed, torch.float32, dim=32)
    arguments = [x.requires_grad_() for x in arguments]
    output = getattr(Backend(packed), phase)(*arguments)
    with pytest.raises(RuntimeError, match=f"{phase} can be differentiated only once"):
        torch.autograd.grad(output.sum(), arguments[0], create_graph=True)


def test_unavailable_says_why(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "runs on cuda" in triton_backend.unavailable(cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.unavailable(cpu) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in triton_backend.unavailable(cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton_backend.unavailable(cuda) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5, it takes 8.0 or newer" in triton_backend.unavailable(cuda)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "this PyTorch is for those of AMD" in triton_backend.unavailable(cuda)
    monkeypatch.setattr(triton_backend, "version", lambda name: "3.3.1")
    assert "3.3 is too old, it takes 3.5" in triton_backend.unavailable(cuda)
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    assert "not installed" in triton_backend.unavailable(cuda)


def test_no_product_begins_with_a_transpose():
    """Triton 3.4 to 3.7.0 miscompile that on Hopper if it is of an accumulator; k is as it was loaded."""
    sources = [path.read_text() for path in Path(triton_backend.__file__).parent.glob("*.py")]
    assert any("tl.dot(" in source for source in sources)
    assert not any(re.search(r"= tl\.dot\(\s*tl\.trans\((?!k\))", source) for source in sources)


def model_gradients(backend, packed, ids):
    torch.manual_seed(0)
    model = MeloFormer(ModelConfig(layers=2, dim=64, heads=2, ffn=64, **ORIGINAL)).to(DEVICE)
    logits = model(ids, packed, make_attention(packed, backend))
    logits.square().mean().backward()
    return [logits, *(p.grad for p in model.parameters())]


def test_the_model_learns_as_with_the_reference():
    packed = case("documents").structure.to(DEVICE)
    ids = torch.randint(400, packed.doc.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = (model_gradients(backend, packed, ids) for backend in ("triton", "reference"))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.detach().abs().max()))


def test_no_token_sees_what_comes_later():
    """The gradient of logits with respect to later embeddings, and other documents, is exactly 0."""
    packed = case("documents").structure.to(DEVICE)
    model = MeloFormer(ModelConfig(layers=2, dim=64, heads=2, ffn=64, **ORIGINAL)).to(DEVICE)
    ids = torch.randint(400, packed.doc.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    attention = make_attention(packed, "triton")
    embedded = keep_embeddings(model)
    logits = model(ids, packed, attention)
    for token in (0, 40, 120, packed.doc.shape[1] - 1):
        (influence,) = torch.autograd.grad(logits[0, token].sum(), embedded[0], retain_graph=True)
        others = packed.doc[0] != packed.doc[0, token]
        others[token + 1 :] = True
        assert influence[0, others].eq(0).all()
        assert influence[0, token].ne(0).any()


class TestCompiled:
    pytestmark = gpu

    def long(self, kind_rule="alike"):
        """One row of a song of about 3,000 tokens, one of several."""
        r = Random(0)
        batch = [[song(r, 60, (128, 33, 0, 80, 25), resting=0.2)], [song(r, 9), song(r, 20), song(r, 3)]]
        return structure(batch, num_summaries=64, kind_rule=kind_rule).to("cuda")

    @pytest.mark.parametrize("dim", [32, 64, 128])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("phase", PHASES)
    def test_error(self, phase, dtype, dim):
        packed = self.long()
        inputs = random_inputs(phase, packed, dtype, dim=dim)
        reference = getattr(make_attention(packed, "reference"), phase)
        torch.use_deterministic_algorithms(False)
        if dtype == torch.float32:
            check(getattr(Backend(packed), phase), reference, inputs, ("o", *INPUTS[phase]))
        else:
            plain = plain_phase(phase, dense_case(packed))
            check_low_precision(getattr(Backend(packed), phase), plain, inputs, ("o", *INPUTS[phase]))

    def test_a_hundred_repeats(self):
        packed = self.long()
        inputs = random_inputs("update", packed, torch.bfloat16, dim=64)
        first = outputs_and_gradients(Backend(packed).update, inputs)
        for _ in range(100):
            again = outputs_and_gradients(Backend(packed).update, inputs)
            assert all(map(torch.equal, first, again))

    @pytest.mark.parametrize("phase", PHASES)
    def test_2048_bars(self, phase):
        packed = structure([[song(Random(1), 2048, (128, 0), resting=0.6)]], num_summaries=2048).to("cuda")
        inputs = random_inputs(phase, packed, torch.float32, dim=64)
        reference = getattr(make_attention(packed, "reference"), phase)
        # BOS is read by every token: a sum of n terms of either sign errs by about sqrt(n) roundings.
        roundings = packed.doc.shape[1] ** 0.5
        check(
            *(getattr(Backend(packed), phase), reference, inputs, ("o", *INPUTS[phase])),
            tolerance=roundings * torch.finfo(torch.float32).eps / 2,
        )

    def test_poisoned_results(self):
        """Every element is written, whatever was in memory: twice over different garbage."""
        packed = self.long()
        inputs = random_inputs("update", packed, torch.bfloat16, dim=64)
        first = outputs_and_gradients(Backend(packed).update, inputs)
        garbage = torch.full((2**28,), float("nan"), device="cuda")
        del garbage
        again = outputs_and_gradients(Backend(packed).update, inputs)
        assert all(x.isfinite().all() for x in first) and all(map(torch.equal, first, again))

    @pytest.mark.parametrize("size", SIZES)
    def test_a_training_step_is_that_of_flex(self, size):
        """Loss and gradients in bf16, by the norm of their difference."""
        batch = [[song(Random(2), 40, (128, 33, 0, 80))]]
        packed = structure(batch, length=2048, num_summaries=128, kind_rule=KIND_RULE).to("cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        ids = torch.randint(400, packed.doc.shape, device="cuda", generator=generator)
        torch.use_deterministic_algorithms(False)
        results = []
        for backend in ("triton", "flex"):
            torch.manual_seed(0)
            model = MeloFormer(replace(SIZES[size], layers=2)).to("cuda")
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(ids, packed, backend)
            nats, count = next_token_loss(logits, ids.where(packed.doc >= 0, -100))
            (nats / count).backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            results.append(((nats / count).item(), gradient))
        (loss, gradient), (flex_loss, flex_gradient) = results
        assert abs(loss - flex_loss) < 2e-3 * flex_loss
        assert (gradient - flex_gradient).norm() < 3e-2 * flex_gradient.norm()

    def test_no_token_of_a_base_model_sees_what_comes_later(self):
        packed = self.long(KIND_RULE)
        torch.manual_seed(0)
        model = MeloFormer(replace(SIZES["base"], layers=3)).to("cuda")
        ids = torch.randint(400, packed.doc.shape, device="cuda")
        embedded = keep_embeddings(model)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(ids, packed, "triton")
        for token in (1, 700, 1500, int((packed.doc[0] >= 0).sum()) - 1):
            (influence,) = torch.autograd.grad(logits[0, token].sum(), embedded[0], retain_graph=True)
            others = packed.doc[0] != packed.doc[0, token]
            others[token + 1 :] = True
            assert influence[0, others].eq(0).all() and influence[1].eq(0).all()
            assert influence[0, token].ne(0).any()

    def test_offsets_beyond_32_bits(self):
        packed = structure([[song(Random(0), 20)]], length=98_304, num_summaries=128).to("cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        joint = torch.randn(1, 98_304, 3, 16, 512, device="cuda", dtype=torch.bfloat16, generator=generator)
        q, k, v = joint[..., :64].permute(2, 0, 3, 1, 4).unbind(0)
        k2, v2 = torch.randn(2, 1, 16, 128, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
        assert 98_304 * q.stride(2) >= 2**31
        got = Backend(packed).update(q, k, v, k2, v2)
        n = int((packed.doc >= 0).sum())
        short = structure([[song(Random(0), 20)]], num_summaries=128).to("cuda")
        cut = (x[:, :, :n] for x in (q, k, v))
        expected = Backend(short).update(*cut, k2, v2)
        torch.testing.assert_close(got[:, :, :n], expected, rtol=2e-2, atol=2e-2)
        assert got[:, :, n:].eq(0).all()
