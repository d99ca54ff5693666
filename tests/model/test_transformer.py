"""The model as a whole: what may influence what, sizes, and the loss."""

from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F

from meloformer.kernels import make_attention
from meloformer.kernels.rope import apply_rope
from meloformer.model.inputs import InputFeatures, read_context
from meloformer.model.layers import Rotary
from meloformer.model.loss import next_token_loss
from meloformer.model.transformer import SIZES, MeloFormer, ModelConfig
from meloformer.tokens import vocab
from meloformer.tokens.vocab import IGNORE_INDEX

from helpers.attention_cases import (
    CASES,
    DRUMS,
    NEAR_BARS,
    ORIGINAL,
    SEES,
    of_length,
    oracle_masks,
    plain_attention,
    song,
    structure,
)
from helpers.model_cases import TINY, add_to_embeddings, influence, of_rule, random_ids, tiny_model

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
pytestmark = [
    pytest.mark.filterwarnings("ignore:FlexAttention has no backward on CPU"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    stated = {"small": 17e6, "base": 85e6, "large": 200e6, "xlarge": 450e6}[size]
    with torch.device("meta"):
        model = MeloFormer(SIZES[size])
    assert model.num_parameters() == pytest.approx(stated, rel=0.02)
    assert SIZES[size].size == size and SIZES[size].head_dim == 64
    attention = sum(
        p.numel()
        for name, p in model.layers[0].named_parameters()
        if "ffn" not in name and "norm" not in name
    )
    assert attention == 10 * SIZES[size].dim ** 2


def design_written_out(model, ids, batch) -> torch.Tensor:
    """Logits [N, V] of a batch of one row, from the weights and sections 3 and 7 of the design."""
    config, weights = model.config, dict(model.named_parameters())
    (row,) = batch
    tokens = [(doc, i, token) for doc, tokens in enumerate(row) for i, token in enumerate(tokens)]
    position_r = torch.tensor([i for _, i, _ in tokens])
    last = {(doc, token.bar): i for doc, i, token in tokens}
    position_s = torch.tensor([last[bar] for bar in sorted(last)])
    features, guesses = read_context(ids, structure(batch))
    time_r = torch.tensor([192 * token.bar for *_, token in tokens]) + (features.onset[0] - 1).clamp(min=0)
    time_s = torch.tensor([192 * (bar + 1) for _, bar in sorted(last)])
    summary_mask, regular_mask = oracle_masks(batch)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weights[name]

    def project(x, name, parts=1):
        parts = (x @ weights[name].T).chunk(parts, dim=-1)
        return [part.unflatten(-1, (config.heads, -1)).transpose(0, 1) for part in parts]  # [H, length, D]

    def rotate(x, position, time):
        half = config.head_dim // 2
        by_time = round(0.75 * half)
        angle = torch.cat(
            [
                clock[:, None] * theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
                for clock, pairs, theta in ((position, half - by_time, 1e4), (time, by_time, 5e5))
            ],
            dim=-1,
        )
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def attend(q, k, v, mask):
        return plain_attention(q[None], k[None], v[None], mask)[0].transpose(0, 1).flatten(1)

    r = weights["token_embedding.weight"][ids[0]]
    r = r + weights["instrument_embedding.weight"][[token.inst for *_, token in tokens]]
    for name, values in features._asdict().items():
        r = r + weights[f"feature_embeddings.{name}.weight"][values[0]]
    s = weights["summary_embedding"].repeat(len(last), 1)
    for i in range(config.layers):
        layer = f"layers.{i}."
        q_s, k_s, v_s = project(norm(s, layer + "norm_s.weight"), layer + "qkv_s.weight", 3)
        q_r, k_r, v_r = project(norm(r, layer + "norm_r.weight"), layer + "qkv_r.weight", 3)
        q_s, k_s = rotate(q_s, position_s, time_s), rotate(k_s, position_s, time_s)
        q_r, k_r = rotate(q_r, position_r, time_r), rotate(k_r, position_r, time_r)
        o_s = attend(q_s, torch.cat([k_s, k_r], 1), torch.cat([v_s, v_r], 1), summary_mask)
        k2, v2 = project(o_s, layer + "kv2.weight", 2)
        k2 = rotate(k2, position_s, time_s)
        o_r = attend(q_r, torch.cat([k2, k_r], 1), torch.cat([v2, v_r], 1), regular_mask)
        streams = [r + o_r @ weights[layer + "out_r.weight"].T]
        if i < config.layers - 1:
            streams.append(s + o_s @ weights[layer + "out_s.weight"].T)
        for j, x in enumerate(streams):
            gate, up = (norm(x, layer + "norm_ffn.weight") @ weights[layer + "ffn.gate_up.weight"].T).chunk(
                2, -1
            )
            streams[j] = x + (gate * gate.sigmoid() * up) @ weights[layer + "ffn.down.weight"].T
        r, s = streams if len(streams) == 2 else (streams[0], s)
    r = norm(r, "norm_out.weight")
    logits = r @ weights["token_embedding.weight"].T
    for row, guess in zip(weights["copy_gate.weight"], guesses):
        for i, label in enumerate(guess[0].tolist()):
            if label:
                logits[i, label] += r[i] @ row
    return logits


@pytest.mark.parametrize("backend", ["reference", "flex"])
def test_forward_is_the_design_written_out(backend):
    random = Random(10)
    batch = [[song(random, 4), song(random, 2)]]
    ids, model = random_ids(batch), tiny_model(ModelConfig(layers=3, dim=32, heads=2, ffn=48, **ORIGINAL))
    with torch.no_grad():
        logits = model(ids, structure(batch), backend)[0]
        expected = design_written_out(model, ids, batch)
    # The tables of RoPE are float32, all else is float64.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "backend, kind_rule", [*(("reference", rule) for rule in SEES), ("flex", "alike"), ("flex", "next")]
)
def test_no_token_sees_what_comes_later_or_other_documents(backend, kind_rule):
    random = Random(1)
    batch = [[song(random, 3), song(random, 2), of_length(random, 20)], [song(random, 4)]]
    packed, ids = structure(batch, kind_rule=kind_rule), random_ids(batch)
    model = tiny_model(of_rule(kind_rule))
    attention = make_attention(packed, backend)
    for row in range(len(batch)):
        for token in range(0, int((packed.doc[row] >= 0).sum()), 5):
            reached = influence(model, ids, packed, attention, row, token) != 0
            doc = packed.doc[row, token]
            allowed = torch.zeros_like(reached)
            allowed[row] = (packed.doc[row] == doc) & (packed.position[row] <= packed.position[row, token])
            assert not (reached & ~allowed).any(), (row, token)
            # Complete bars are all visible, through their summaries if not directly.
            complete = (packed.doc[row] == doc) & (packed.bar[row] < packed.bar[row, token])
            assert reached[row, complete].all() and reached[row, token], (row, token)


@pytest.mark.parametrize("kind_rule", SEES)
def test_one_layer_reaches_exactly_what_the_rule_says(kind_rule):
    batch = [[song(Random(2), 4), song(Random(3), 2)]]
    packed, ids = structure(batch, kind_rule=kind_rule), random_ids(batch)
    model = tiny_model(replace(of_rule(kind_rule), layers=1))
    attention = make_attention(packed, "reference")
    _, regular_mask = oracle_masks(batch, kind_rule=kind_rule)
    directly = regular_mask[0, :, -packed.doc.shape[1] :]
    for token in range(0, packed.doc.shape[1], 3):
        reached = influence(model, ids, packed, attention, 0, token)[0] != 0
        by_summary = (packed.doc == packed.doc[0, token]) & (packed.bar < packed.bar[0, token])
        assert torch.equal(reached, directly[token] | by_summary[0]), token


@pytest.mark.parametrize("backend", ["reference", "flex"])
def test_logits_of_a_prefix_are_a_prefix_of_the_logits(backend):
    """What a token's facts say must not depend on later tokens either."""
    tokens = song(Random(4), 4)
    ids, model = random_ids([[tokens]]), tiny_model()
    with torch.no_grad():
        whole = model(ids, structure([[tokens]]), backend)
        for length in range(1, len(tokens), 11):
            prefix = model(ids[:, :length], structure([[tokens[:length]]]), backend)
            torch.testing.assert_close(prefix, whole[:, :length], rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "flex"])
def test_packing_equals_separate_songs(backend):
    random = Random(5)
    songs = [song(random, 3), of_length(random, 1), song(random, 2, (DRUMS,)), song(random, 5, resting=0.8)]
    batch = [songs[:2], songs[2:]]
    ids, model = random_ids(batch), tiny_model()
    packed = model(ids, structure(batch), backend)
    for row, documents in enumerate(batch):
        start = 0
        for tokens in documents:
            stop = start + len(tokens)
            alone = model(ids[row : row + 1, start:stop], structure([[tokens]]), backend)[0]
            torch.testing.assert_close(packed[row, start:stop], alone, rtol=0, atol=1e-11)
            start = stop


@pytest.mark.parametrize("backend", ["reference", "flex"])
def test_padding_changes_nothing(backend):
    batch = CASES["rows"](Random(6))
    length = max(sum(map(len, row)) for row in batch)
    model = tiny_model()
    tight, wide = structure(batch), structure(batch, length + 9, num_summaries=30)
    ids = random_ids(batch)
    logits = model(ids, tight, backend)
    assert logits.isfinite().all()
    padded = model(F.pad(ids, (0, 9)), wide, backend)[:, :length]
    real = tight.doc >= 0
    torch.testing.assert_close(padded[real], logits[real], rtol=0, atol=1e-11)
    other = model(ids.where(real, random_ids(batch, seed=1)), tight, backend)
    assert torch.equal(other[real], logits[real])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_parameter_learns_and_padding_rows_are_finite(dtype):
    """A parameter without a gradient would stall distributed training."""
    batch = CASES["padding_row"](Random(7))
    packed, ids = structure(batch), random_ids(batch)
    model = tiny_model(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(ids, packed, "reference")
    nats, count = next_token_loss(logits, ids.where(packed.doc >= 0, IGNORE_INDEX))
    (nats / count).backward()
    assert logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_backends_agree_on_the_loss_gradient():
    batch = CASES["documents"](Random(8))
    packed, ids, model = structure(batch), random_ids(batch), tiny_model()
    gradients = []
    for backend in ("reference", "flex"):
        nats, _ = next_token_loss(model(ids, packed, backend), ids)
        gradients.append(torch.autograd.grad(nats, list(model.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_initial_deviations():
    torch.manual_seed(0)
    model = MeloFormer(ModelConfig(layers=8, dim=128, heads=2, ffn=256))
    residual = 0.02 / 4
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.eq(1).all(), name
        else:
            std = residual if any(part in name for part in ("out_s", "out_r", "down")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.3 if parameter.dim() == 1 else 0.05), (
                name
            )


@pytest.mark.parametrize("reads", [{"features"}, {"time_fraction"}, {"copy_chords"}, set()])
def test_each_of_the_musical_inputs_alone(reads):
    """Nothing is read for the others, and what is there counts."""
    off = {"features": (), "time_fraction": 0.0, "copy_chords": False}
    model = tiny_model(replace(TINY, **{name: value for name, value in off.items() if name not in reads}))
    batch = [[song(Random(1), 12)], [song(Random(2), 9)]]
    packed, ids = structure(batch), random_ids(batch)
    context = model.read(ids, packed)
    assert len(context.rows) == (9 if "features" in reads else 2) and context.readers is None
    assert (context.onset is not None, context.copies is not None) == (
        "time_fraction" in reads,
        "copy_chords" in reads,
    )
    model.zero_grad()
    logits = model(ids, packed, "reference")
    logits.square().mean().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    if "time_fraction" in reads:
        later = context._replace(onset=context.onset + 5 * (context.onset > 0))
        assert not torch.equal(model(ids, packed, "reference", later), logits)


def test_a_table_that_is_frozen_gets_no_gradient():
    model = MeloFormer(ModelConfig(layers=1, dim=32, heads=1, ffn=32))
    model.instrument_embedding.requires_grad_(False)
    rows = model.rows_of(
        torch.tensor([[5, 6]]), torch.tensor([[0, 1]]), InputFeatures(*torch.ones(7, 1, 2).long())
    )
    model.embed(rows).sum().backward()
    assert model.instrument_embedding.weight.grad is None
    assert model.token_embedding.weight.grad.sum(1).nonzero().flatten().tolist() == [5, 6]
    assert model.feature_embeddings["chord"].weight.grad.sum(1).nonzero().flatten().tolist() == [1]


def test_rotary_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64)

    def product(position_q, position_k):
        at = [
            Rotary([(torch.tensor([[position]]), 32, 10000.0)], torch.float64)
            for position in (position_q, position_k)
        ]
        q_rotated, k_rotated = (apply_rope(x[None], r.cos_BND, r.sin_BND) for x, r in zip((q, k), at))
        return (q_rotated * k_rotated).sum()

    torch.testing.assert_close(product(7, 3), product(1007, 1003), rtol=0, atol=1e-3)
    torch.testing.assert_close(product(0, 0), (q * k).sum())
    assert (product(7, 3) - product(8, 3)).abs() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tables_of_rope_are_made_once_in_the_precision_of_the_products(dtype, monkeypatch):
    made = []
    init = Rotary.__init__
    monkeypatch.setattr(Rotary, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])
    batch = CASES["one_bar"](Random(9))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        tiny_model(dtype=torch.float32)(random_ids(batch), structure(batch), "reference")
    assert [table.cos_BND.dtype for table in made] == [dtype, dtype]  # of the two streams


def test_wrong_structure_is_refused():
    batch = CASES["one_bar"](Random(9))
    packed, ids = structure(batch), random_ids(batch)
    with pytest.raises(ValueError, match="do not fit"):
        tiny_model()(ids[:, 1:], packed)
    with pytest.raises(ValueError, match="near_bars"):
        tiny_model(replace(TINY, near_bars=(0,)))(ids, packed)
    with pytest.raises(ValueError, match="structure has kind_rule alike, not next"):
        tiny_model(replace(TINY, kind_rule="next"))(ids, packed)


def test_config_normalises_and_refuses():
    assert ModelConfig(1, 32, 2, 48, near_bars=list(NEAR_BARS)).near_bars == NEAR_BARS
    assert 0 <= ModelConfig(1, 32, 2, 48).padded_vocab_size - vocab.VOCAB_SIZE < 64
    assert ModelConfig(1, 32, 2, 48, vocab_size=1395).padded_vocab_size == 1408
    assert ModelConfig(1, 32, 2, 48, vocab_size=128).padded_vocab_size == 128
    with pytest.raises(ValueError, match="multiple"):
        ModelConfig(1, 30, 4, 48)
    with pytest.raises(ValueError, match="no input features"):
        replace(TINY, features=("onset", "mood"))
    with pytest.raises(ValueError, match="time_fraction"):
        replace(TINY, time_fraction=1.5)
    with pytest.raises(ValueError, match="unknown kind_rule 'other'"):
        replace(TINY, kind_rule="other")
    for rule in ("alike", "next"):
        with pytest.raises(ValueError, match=f"dense model has no kind_rule, got '{rule}'"):
            replace(TINY, kind_rule=rule, dense=True)


def batches_of_one_shape(number: int, length: int, num_summaries: int, device="cpu"):
    for seed in range(number):
        random = Random(seed)
        batch = [
            [of_length(random, length // 3), of_length(random, length // 2)],
            [of_length(random, length - 5)],
        ]
        packed = structure(batch, length, num_summaries).to(device)
        yield packed, random_ids(batch, length, seed).to(device)


def test_compiled_model_is_one_graph_and_compiles_once():
    """Dynamo alone, without generating code: it decides on graph breaks and recompilation."""
    torch._dynamo.reset()
    model = tiny_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for i, (packed, ids) in enumerate(batches_of_one_shape(4, 100, 40)):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                logits = compiled(ids, packed, make_attention(packed, "flex"))
            expected = model(ids, packed, "reference")
            real = packed.doc >= 0
            torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-11)


class TestCompiledFlex:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def forget_compiled_code(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize("whole_model", [False, True], ids=["attention_compiled", "model_compiled"])
    def test_causality(self, whole_model):
        random = Random(1)
        batch = [[song(random, 5), song(random, 8)], [song(random, 6)]]
        packed, ids = structure(batch).to("cuda"), random_ids(batch).cuda()
        model = tiny_model(ModelConfig(layers=2, dim=64, heads=2, ffn=64, **ORIGINAL), torch.float32).cuda()
        attention = make_attention(packed, "flex")
        callee = torch.compile(model, dynamic=False) if whole_model else model
        probe = torch.zeros(*ids.shape, 64, device="cuda", requires_grad=True)
        add_to_embeddings(model, probe)
        for row in range(2):
            for token in range(0, int((packed.doc[row] >= 0).sum()), 23):
                logits = callee(ids, packed, attention)[row, token]
                (gradient,) = torch.autograd.grad(logits @ torch.randn_like(logits), probe)
                reached = gradient.abs().amax(dim=-1) != 0
                allowed = torch.zeros_like(reached)
                same = packed.doc[row] == packed.doc[row, token]
                allowed[row] = same & (packed.position[row] <= packed.position[row, token])
                complete = same & (packed.bar[row] < packed.bar[row, token])
                assert not (reached & ~allowed).any() and reached[row, complete].all(), (row, token)

    @pytest.mark.parametrize("whole_model", [False, True], ids=["attention_compiled", "model_compiled"])
    def test_training_compiles_once_for_batches_of_one_shape(self, whole_model):
        model = MeloFormer(ModelConfig(layers=2, dim=128, heads=2, ffn=128, **ORIGINAL)).cuda()
        callee = torch.compile(model, dynamic=False) if whole_model else model
        for i, (packed, ids) in enumerate(batches_of_one_shape(5, 700, 256, "cuda")):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                attention = make_attention(packed, "flex")
                with torch.autocast("cuda", torch.bfloat16):
                    logits = callee(ids, packed, attention)
                nats, count = next_token_loss(logits, ids.where(packed.doc >= 0, IGNORE_INDEX))
                (nats / count).backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
