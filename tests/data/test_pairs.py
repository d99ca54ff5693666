"""The count of visible pairs, against the visibility rule pair by pair."""

from dataclasses import replace
from random import Random

import pytest
import torch

from meloformer.composer.compose import compose
from meloformer.kernels import Structure
from meloformer.kernels.structure import regular_sees, summary_sees
from meloformer.tokens.attributes import scan
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.attention_cases import CASES, NEAR_BARS, NEW_RULES, count_pairs, facts, structure


def by_the_rule(packed: Structure) -> dict[str, int]:
    summaries, tokens = packed.summaries, packed.tokens
    keys = packed.keys.at(slice(None), None)
    at = (slice(None), slice(None), None)
    own = tokens.at(slice(None), None)
    causal = (tokens.doc[:, :, None] == own.doc) & (own.doc >= 0)
    causal &= own.position <= tokens.position[:, :, None]
    return {
        "tokens": int((packed.doc >= 0).sum()),
        "summaries": int((packed.summary_doc >= 0).sum()),
        "summary_pairs": int(summary_sees(summaries.at(*at), keys).sum()),
        "token_pairs": int(regular_sees(tokens.at(*at), keys, packed.near_bars, packed.kind_rule).sum()),
        "causal_pairs": int(causal.sum()),
    }


@pytest.mark.parametrize("near_bars", [NEAR_BARS, (), (0,), (3, 1), (1, 7, 300)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_rule(name, near_bars):
    packed = replace(structure(CASES[name](Random(name))), near_bars=near_bars)
    assert vars(count_pairs(packed)) == by_the_rule(packed)


@pytest.mark.parametrize("kind_rule", NEW_RULES)
@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_every_kind_rule(name, kind_rule):
    packed = structure(CASES[name](Random(name)), kind_rule=kind_rule)
    assert vars(count_pairs(packed)) == by_the_rule(packed)


def test_padding_counts_for_nothing():
    batch = CASES["rows"](Random(1))
    assert count_pairs(structure(batch, length=400, num_summaries=60)) == count_pairs(structure(batch))
    nothing = structure([[], []], length=8, num_summaries=4)
    assert set(vars(count_pairs(nothing)).values()) == {0}


def test_bars_without_tokens_count_as_distance_alone():
    """As a cut of a longer song may have them: bars 5, 6 and 9."""
    columns = facts([[[(bar, 0, 2, bar) for bar in (5, 5, 6, 9)]]])
    packed = Structure.build(**columns, num_summaries=4)
    assert vars(count_pairs(packed)) == by_the_rule(packed)


def test_a_composed_song():
    scanned = scan(HIDTokenizer().encode(compose(3, bars=12)))
    columns = [torch.from_numpy(fact)[None] for fact in vars(scanned).values()]
    packed = Structure.build(torch.zeros_like(columns[0]), *columns)
    assert vars(count_pairs(packed)) == by_the_rule(packed)


def test_an_instrument_may_come_twice_in_a_bar():
    tokens = [
        (bar, inst, kind, 10 * bar + i)
        for bar in (0, 1)
        for i, inst in enumerate((5, 6, 5))
        for kind in (1, 2, 4)
    ]
    packed = structure([[tokens]])
    assert vars(count_pairs(packed)) == by_the_rule(packed)
