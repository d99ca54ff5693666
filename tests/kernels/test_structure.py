from random import Random

import pytest
import torch

from meloformer.kernels import Structure
from meloformer.kernels.structure import KIND_RULES, regular_sees, summary_sees

from helpers.attention_cases import (
    CASES,
    NEAR_BARS,
    NEW_RULES,
    NONE,
    SEES,
    facts,
    oracle_masks,
    song,
    structure,
)

SEEDS = (0, 1, 2)


def batch_of(name, seed):
    return CASES[name](Random(f"{name} {seed}"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_build_equals_a_walk_over_the_tokens(name, seed):
    batch = batch_of(name, seed)
    built = structure(batch)
    num_summaries = built.summary_doc.shape[1]
    most_bars = 0
    for b, row in enumerate(batch):
        position, summaries = [], []
        for doc, tokens in enumerate(row):
            for i, token in enumerate(tokens):
                position.append(i)
                if not summaries or summaries[-1][:2] != [doc, token.bar]:
                    summaries.append([doc, token.bar, i])
                summaries[-1][2] = i
        most_bars = max(most_bars, len(summaries))
        length = len(position)
        assert built.position[b].tolist() == position + [0] * (built.doc.shape[1] - length)
        assert built.doc[b, length:].eq(-1).all() and built.doc[b, :length].ge(0).all()
        got = torch.stack([built.summary_doc, built.summary_bar, built.summary_position], dim=-1)[b].tolist()
        assert got == summaries + [[-1, 0, 0]] * (num_summaries - len(summaries))
    assert num_summaries == max(1, most_bars)
    assert all(fact.dtype == torch.int32 for fact in (*built.tokens, *built.summaries, *built.keys))


@pytest.mark.parametrize("near_bars", [NEAR_BARS, (), (0,), (3, 1)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rule_equals_the_table(name, near_bars):
    batch = batch_of(name, 0)
    built = Structure.build(**facts(batch), near_bars=near_bars, kind_rule="alike")
    check_rule(built, *oracle_masks(batch, near_bars))


def check_rule(built, summary_mask, regular_mask):
    queries, keys = (slice(None), slice(None), None), (slice(None), None)
    assert torch.equal(summary_sees(built.summaries.at(*queries), built.keys.at(*keys)), summary_mask)
    tokens = built.tokens.at(*queries)
    seen = regular_sees(tokens, built.keys.at(*keys), built.near_bars, built.kind_rule)
    assert torch.equal(seen, regular_mask)


@pytest.mark.parametrize("kind_rule", NEW_RULES)
@pytest.mark.parametrize("name", ["1_token", "near_bar_edges", "documents", "rows", "16_instruments"])
def test_every_kind_rule_equals_the_table(name, kind_rule):
    batch = batch_of(name, 0)
    check_rule(structure(batch, kind_rule=kind_rule), *oracle_masks(batch, kind_rule=kind_rule))


def test_the_tables_name_the_same_kind_rules():
    assert [*KIND_RULES] == [*SEES] and {*NEW_RULES} == {*SEES} - {"alike"}


def test_rule_on_single_tokens():
    built = structure([[song(Random(0), 3)]])
    _, regular_mask = oracle_masks([[song(Random(0), 3)]])
    for t, u in [(0, 3), (5, 2), (20, 3), (20, 9)]:
        seen = regular_sees(built.tokens.at(0, t), built.keys.at(0, u), NEAR_BARS, "alike")
        assert seen.shape == () and seen == regular_mask[0, t, u]


def test_more_summaries_are_padding():
    batch = batch_of("rows", 0)
    tight, wide = structure(batch), structure(batch, num_summaries=20)
    bars = tight.summary_doc.shape[1]
    for small, large in zip(tight.summaries, wide.summaries):
        assert torch.equal(small, large[:, :bars])
    assert wide.summary_doc[:, bars:].eq(-1).all() and wide.summary_doc.shape == (3, 20)


def test_padding_facts_are_harmless_whatever_was_given():
    given = facts(batch_of("rows", 0))
    padding = given["doc"] < 0
    wild = {name: fact.masked_fill(padding, -7 if name == "doc" else 999) for name, fact in given.items()}
    built, clean = Structure.build(**wild), Structure.build(**given)
    assert all(torch.equal(a, b) for a, b in zip(built.keys, clean.keys))
    assert built.inst[padding].eq(NONE).all()


def test_bars_may_begin_anywhere_and_skip():
    one = torch.ones(1, 5, dtype=torch.int64)
    bar = torch.tensor([[7, 7, 9, 9, 3]])
    built = Structure.build(torch.tensor([[2, 2, 2, 2, 5]]), bar, one, one, one)
    assert built.summary_bar.tolist() == [[7, 9, 3]]
    assert built.summary_position.tolist() == [[1, 3, 0]]
    assert built.summary_doc.tolist() == [[2, 2, 5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_summaries": 3}, "more than 3 bars"),
        ({"near_bars": (0, -1)}, "negative"),
        ({"kind_rule": "other"}, "unknown kind_rule 'other': there are alike, next, any"),
        ({"bar": torch.tensor([[0, 1, 2, 3, 2, 0]])}, "ascend"),
        ({"doc": torch.tensor([[1, 1, 1, 0, 0, -1]])}, "ascend"),
        ({"doc": torch.tensor([[0, 0, -1, 1, 1, 1]])}, "end of a row"),
        ({"doc": torch.tensor([[-1, 0, 0, 0, 0, 0]])}, "end of a row"),
        ({"bar": torch.zeros(1, 5, dtype=torch.int64)}, "one shape"),
        ({name: torch.zeros(6) for name in ("doc", "bar", "inst", "kind", "onset")}, "one shape"),
    ],
    ids=[
        "bars",
        "near_bars",
        "kind_rule",
        "bar_order",
        "doc_order",
        "hole",
        "padding_first",
        "shape",
        "no_rows",
    ],
)
def test_build_refuses(change, message):
    zeros = torch.zeros(1, 6, dtype=torch.int64)
    good = {name: zeros for name in ("doc", "inst", "kind", "onset")} | {"bar": torch.arange(6)[None]}
    with pytest.raises(ValueError, match=message):
        Structure.build(**(good | change))


def test_to_moves_every_tensor():
    built = Structure.build(**facts(batch_of("rows", 0)), near_bars=(3,), kind_rule="next")
    moved = built.to("meta")
    assert moved.device.type == "meta" and (moved.near_bars, moved.kind_rule) == ((3,), "next")
    assert all(fact.device.type == "meta" for fact in (*moved.keys, *moved.tokens))
