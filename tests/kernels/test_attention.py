"""The backends of any dtype and device against the float64 oracle of attention_cases.py, and the choice
of a backend. `triton` is tested in test_triton.py."""

import warnings

import pytest
import torch

from meloformer.kernels import BACKENDS, flex, make_attention, resolve_backend, triton_backend

from helpers.attention_cases import (
    CASES,
    INPUTS,
    NEW_RULES,
    PHASES,
    case,
    check_low_precision,
    check_padding,
    outputs_and_gradients,
    plain_phase,
    random_inputs,
)

SEEDS = (0, 1, 2)
PORTABLE = ("reference", "flex")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """Every case has shapes of its own, and PyTorch compiles a function for few shapes only."""
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:FlexAttention has no backward on CPU")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", PORTABLE)
def test_outputs_and_gradients_in_float64(backend, name, phase, seed):
    check_in_float64(backend, case(name, seed), phase, seed)


@pytest.mark.filterwarnings("ignore:FlexAttention has no backward on CPU")
@pytest.mark.parametrize("kind_rule", NEW_RULES)
@pytest.mark.parametrize("backend", PORTABLE)
def test_kind_rules(backend, kind_rule):
    check_in_float64(backend, case("documents", kind_rule=kind_rule), "update", seed=0)


def check_in_float64(backend, masks, phase, seed):
    inputs = random_inputs(phase, masks.structure, torch.float64, seed=seed)
    function = getattr(make_attention(masks.structure, backend), phase)
    expected = outputs_and_gradients(plain_phase(phase, masks), inputs)
    got = outputs_and_gradients(function, inputs)
    for what, a, b in zip(("o", *INPUTS[phase]), got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13 * max(1, b.abs().max()), msg=what)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_flex_without_gradients_runs_flex_attention_itself(name, phase, monkeypatch):
    check_flex_itself(case(name), phase, monkeypatch)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind_rule", NEW_RULES)
def test_flex_attention_itself_follows_the_kind_rule(kind_rule, monkeypatch):
    check_flex_itself(case("documents", kind_rule=kind_rule), "update", monkeypatch)


def check_flex_itself(masks, phase, monkeypatch):
    monkeypatch.setattr(flex.reference, "attend", None)
    *arguments, _ = random_inputs(phase, masks.structure, torch.float64)
    got = getattr(make_attention(masks.structure, "flex"), phase)(*arguments)
    torch.testing.assert_close(got, plain_phase(phase, masks)(*arguments), rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore:FlexAttention has no backward on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["documents", "rows", "all_keys_visible", "63_tokens", "257_tokens"])
@pytest.mark.parametrize("backend", PORTABLE)
def test_error_in_low_precision(backend, name, phase, dtype):
    masks = case(name)
    inputs = random_inputs(phase, masks.structure, dtype, dim=64)
    function = getattr(make_attention(masks.structure, backend), phase)
    check_low_precision(function, plain_phase(phase, masks), inputs, ("o", *INPUTS[phase]))


@pytest.mark.filterwarnings("ignore:FlexAttention has no backward on CPU")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("backend", PORTABLE)
def test_padding_gets_zero_and_matters_to_nobody(backend, phase):
    structure = case("rows").structure
    check_padding(getattr(make_attention(structure, backend), phase), phase, structure, dim=8)


def test_flex_says_once_that_it_is_dense_on_cpu():
    flex._say_dense.cache_clear()
    attention = make_attention(case("one_bar").structure, "flex")
    inputs = random_inputs("update", attention.structure, torch.float32)
    with pytest.warns(UserWarning, match="no backward on CPU") as caught:
        outputs_and_gradients(attention.update, inputs)
        outputs_and_gradients(attention.update, inputs)
    assert len(caught) == 1


def test_auto_is_reference_on_cpu_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", "cpu") == "reference"
        assert make_attention(case("one_bar").structure).backend == "reference"


def test_auto_on_cuda_takes_the_best_and_says_what_it_passes_over(monkeypatch):
    monkeypatch.setattr(triton_backend, "unavailable", lambda device: None)
    monkeypatch.setattr(flex, "unavailable", lambda device: None)
    assert resolve_backend("auto", "cuda") == "triton"
    monkeypatch.setattr(triton_backend, "unavailable", lambda device: "a reason")
    with pytest.warns(UserWarning, match="'triton' is left out: a reason"):
        assert resolve_backend("auto", "cuda") == "flex"
    monkeypatch.setattr(flex, "unavailable", lambda device: "another")
    with pytest.warns(UserWarning, match="'flex' is left out: another"):
        assert resolve_backend("auto", "cuda") == "reference"
    with pytest.raises(RuntimeError, match="'flex' cannot run on cuda: another"):
        resolve_backend("flex", "cuda")


def test_flex_on_cuda_needs_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flex, "find_spec", lambda name: None)
    assert "triton" in flex.unavailable(torch.device("cuda"))


def test_flex_compiles_for_more_shapes_than_pytorch_allows_by_default():
    """Dynamo alone, without generating code: it is what counts recompilations."""
    compiled = torch.compile(flex.flex_attention, backend="eager", dynamic=False, fullgraph=True)
    attention = make_attention(case("one_bar").structure, "flex")
    mask_mod = attention._implementation._update._mask_mod
    for length in range(1, 11):
        q = torch.zeros(1, 1, length, 8)
        compiled(q, q, q, block_mask=flex.create_block_mask(mask_mod, 1, None, length, length, device="cpu"))


def test_unknown_backend_lists_the_names():
    with pytest.raises(ValueError, match=r"unknown attention backend 'fast'.*auto, reference, flex, triton"):
        resolve_backend("fast", "cpu")


def test_a_new_backend_is_one_line(monkeypatch):
    monkeypatch.setitem(BACKENDS, "mine", ".reference")
    assert make_attention(case("one_bar").structure, "mine").backend == "mine"


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[0], "floating .B, H, length, D."),
        (0, lambda x: x.int(), "floating .B, H, length, D."),
        (1, lambda x: x[:, :, 1:], "expected .B, H, length, D."),
        (1, lambda x: x[:, :1], "expected .B, H, length, D."),
        (2, lambda x: x[..., :-1], "expected .B, H, length, D."),
        (3, lambda x: x.double(), "one dtype"),
        (4, lambda x: x.to("meta"), "a tensor on meta"),
    ],
    ids=["dims", "integer", "length", "heads", "head_dim", "dtype", "device"],
)
@pytest.mark.parametrize("phase", PHASES)
def test_wrong_arguments_are_refused(phase, index, change, message):
    attention = make_attention(case("rows").structure, "reference")
    *arguments, _ = random_inputs(phase, attention.structure, torch.float32)
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=message):
        getattr(attention, phase)(*arguments)


@pytest.mark.parametrize("phase", PHASES)
class TestCompiledFlex:
    pytestmark = gpu

    # Few cases: each compiles for a quarter of a minute.
    @pytest.mark.parametrize(
        "name, dtype",
        [
            ("documents", torch.bfloat16),
            ("rows", torch.bfloat16),
            ("257_tokens", torch.bfloat16),
        ],
        ids=["documents-bf16", "rows-bf16", "257_tokens-bf16"],
    )
    def test_error(self, name, phase, dtype):
        masks = case(name)
        attention = make_attention(masks.structure.to("cuda"), "flex")
        inputs = random_inputs(phase, attention.structure, dtype, dim=64)
        function = getattr(attention, phase)
        check_low_precision(function, plain_phase(phase, masks), inputs, ("o", *INPUTS[phase]))

    @pytest.mark.parametrize("name", ["1_token", "padding_row", "rows"])
    def test_float32(self, name, phase):
        masks = case(name)
        attention = make_attention(masks.structure.to("cuda"), "flex")
        inputs = random_inputs(phase, attention.structure, torch.float32, dim=64)
        expected = outputs_and_gradients(plain_phase(phase, masks), inputs)
        got = outputs_and_gradients(getattr(attention, phase), inputs)
        for what, a, b in zip(("o", *INPUTS[phase]), got, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=what)

    def test_padding_gets_zero(self, phase):
        structure = case("rows").structure.to("cuda")
        inputs = random_inputs(phase, structure, torch.bfloat16, dim=64)
        output, query_gradient, *_ = outputs_and_gradients(
            getattr(make_attention(structure, "flex"), phase), inputs
        )
        padding = (structure.summary_doc if phase == "summarize" else structure.doc) < 0
        for x in (output, query_gradient):
            assert x.transpose(1, 2)[padding].eq(0).all()
