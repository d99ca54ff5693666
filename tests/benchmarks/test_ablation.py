"""Attention that lacks a part: what is still seen, and that the kernels leave out the same."""

from dataclasses import replace
from random import Random

import pytest
import torch

from benchmarks.common.attention_label import attention_label
from benchmarks.learning import ablation
from meloformer.errors import UserError
from meloformer.kernels.structure import NO_INSTRUMENT, regular_sees

from helpers.attention_cases import song, structure
from helpers.model_cases import of_rule, random_ids, tiny_model

RANDOM = Random(4)
BATCH = [[song(RANDOM, 5), song(RANDOM, 3)]]


@pytest.fixture
def packed():
    return structure(BATCH, kind_rule="any")


def seen(packed):
    keys = packed.keys.at(slice(None), None)
    return regular_sees(packed.tokens.at(slice(None), slice(None), None), keys, (0, 1), "any")[0]


def test_no_summary_is_seen(packed):
    summaries = packed.summary_doc.shape[1]
    before, after = seen(packed), seen(ablation.without_summaries(packed))
    assert before[:, :summaries].any() and not after[:, :summaries].any()
    assert torch.equal(before[:, summaries:], after[:, summaries:])


def test_of_the_own_instrument_only_near_bars_are_seen(packed):
    summaries = packed.summary_doc.shape[1]
    before, after = seen(packed), seen(ablation.without_own_past(packed))
    tokens = packed.tokens
    far = tokens.bar[0, :, None] - tokens.bar[0, None] > 1
    by_instrument = far & (tokens.inst[0, None] != NO_INSTRUMENT)
    assert before[:, summaries:][by_instrument].any()
    expected = before.clone()
    expected[:, summaries:] &= ~by_instrument
    assert torch.equal(after, expected)


@pytest.mark.parametrize("part", ablation.PARTS)
def test_the_kernels_leave_out_the_same(part, packed, monkeypatch):
    model = tiny_model(replace(of_rule("any"), heads=1), torch.float32)
    monkeypatch.setattr(type(model), "attention_for", type(model).attention_for)  # put back in the end
    ids = random_ids(BATCH)
    whole = model(ids, packed, "reference")
    ablation.leave_out(part)
    results = []
    for name in ("reference", "triton"):
        model.zero_grad()
        logits = model(ids, packed, name)
        logits.square().mean().backward()
        results.append((logits, *(p.grad for p in model.parameters())))
    assert not torch.allclose(whole, results[0][0], rtol=0, atol=1e-2 * whole.abs().max().item())
    for plain, fast in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4 * plain.abs().max().item())


def test_a_run_says_what_it_lacked(tmp_path):
    assert ablation.lacking(tmp_path) is None
    (tmp_path / ablation.ABLATION).write_text('{"without": "own past"}')
    run = {"attention": "triton", "without": ablation.lacking(tmp_path)}
    assert attention_label(run) == "triton, no own past"


@pytest.mark.parametrize("argv", [[], ["rhythm"]])
def test_unknown_parts_are_refused(argv):
    with pytest.raises(UserError, match="summaries or own_past"):
        ablation.main(argv)
