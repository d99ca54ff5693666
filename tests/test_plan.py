"""The plan on its own: which pairs its lists and bits cover, against the oracle."""

from random import Random

import pytest
import torch

from meloformer.kernels.plan import make_plan
from meloformer.kernels.structure import Facts, Structure, regular_sees
from meloformer.kernels.tiling import Launch, PassTiles, Tiles, fitting

from attention_cases import CASES, case, facts, oracle_masks, song
from plan_cases import DEVICE, coverage

SIZES = ((16, 32), (32, 16), (64, 64))


def tiles_of(block_m: int, block_n: int, split: int = 2) -> Tiles:
    tiles = PassTiles(block_m, block_n)
    return Tiles(tiles, tiles, tiles, split=split)


def check_coverage(plan, summary_mask, regular_mask):
    """Each visible pair in one tile of one pass, no invisible one in any, and both directions agree."""
    for passes, mask in ((plan.summarize, summary_mask), (plan.update, regular_mask)):
        counts = [coverage(p, *mask.shape[1:]) for p in passes]
        for by_queries, by_keys in counts:
            assert torch.equal(by_queries, by_keys)
        assert torch.equal(sum(by_queries for by_queries, _ in counts), mask.long())


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", CASES)
def test_every_visible_pair_is_covered_once(name, size):
    masks = case(name)
    plan = make_plan(masks.structure.to(DEVICE), tiles_of(*size))
    check_coverage(plan, masks.summary_mask, masks.regular_mask)


@pytest.mark.parametrize("near_bars", [(), (0,), (3, 0, 3), (1, 7, 40)], ids=str)
def test_near_bars(near_bars):
    batch = [[song(Random(1), 12, (0, 33), resting=0.2)]]
    structure = Structure.build(**facts(batch), near_bars=near_bars)
    plan = make_plan(structure.to(DEVICE), tiles_of(32, 32))
    check_coverage(plan, *oracle_masks(batch, near_bars))


@pytest.mark.parametrize("seed", range(4))
def test_tokens_without_any_grammar(seed):
    """Facts drawn at random: the rule on tiles is the rule of `structure`, whatever the tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, length: int = 90) -> torch.Tensor:
        return torch.randint(high, (2, length), generator=generator)

    drawn = {"doc": draw(3).sort().values, "bar": draw(9), "inst": draw(3) + 127, "kind": draw(5)}
    drawn["bar"] = (drawn["doc"] * 9 + drawn["bar"]).sort().values  # ascending within a document
    drawn["doc"][0, 70:] = -1
    structure = Structure.build(**drawn, onset=draw(12))
    plan = make_plan(structure.to(DEVICE), tiles_of(16, 16))
    queries = structure.tokens.at(slice(None), slice(None), None)
    keys = structure.keys.at(slice(None), None)
    mask = regular_sees(Facts(*queries), Facts(*keys), structure.near_bars)
    got = sum(coverage(p, *mask.shape[1:])[0] for p in plan.update)
    assert torch.equal(got, mask.long())


def test_work_is_complete_and_longest_first():
    plan = make_plan(case("257_tokens").structure.to(DEVICE), tiles_of(16, 16, split=3))
    for p in (*plan.summarize, *plan.update):
        lengths = p.queries.total[p.query_work.long()]
        assert torch.equal(lengths, lengths.sort(descending=True).values)
        assert lengths.sum() == p.queries.total.sum()
        assert len(lengths) == (len(p.queries.total) if p.first else (p.queries.total > 0).sum())
        taken = {}
        for line, first, end, slot in p.key_work.tolist():
            taken.setdefault(line, []).append((first, end, slot))
        for line, total in enumerate(p.keys.total.tolist()):
            parts = taken.pop(line, [])
            if total == 0 and not p.first:
                assert not parts
                continue
            bounds = [first for first, _, _ in parts] + [parts[-1][1]]
            assert bounds[0] == 0 and bounds[-1] == total
            assert all(
                0 <= end - first <= 3 and end == after for (first, end, _), after in zip(parts, bounds[1:])
            )
            assert (len(parts) == 1) == (parts[0][2] == -1)
            if len(parts) > 1:
                slots = [slot for _, _, slot in parts]
                assert [line, slots[0], slots[-1] + 1] in p.split_keys.tolist()
        assert not taken
        assert p.slots == sum(end - first for _, first, end in p.split_keys.tolist())


def test_two_plans_are_equal():
    structure = case("documents").structure.to(DEVICE)
    first, second = (make_plan(structure, tiles_of(16, 32)) for _ in range(2))
    for a, b in zip((*first.summarize, *first.update), (*second.summarize, *second.update)):
        assert torch.equal(a.key_work, b.key_work) and torch.equal(a.query_work, b.query_work)
        for lines, others in ((a.queries, b.queries), (a.keys, b.keys)):
            assert torch.equal(lines.blocks, others.blocks) and torch.equal(lines.bits, others.bits)


def test_tiles_are_powers_of_two_that_triton_multiplies():
    with pytest.raises(ValueError, match="tile side"):
        PassTiles(block_m=48)


@pytest.mark.parametrize(("limit", "stages"), [(99, 3), (45, 3), (44, 2), (10, 1)])
def test_stages_fit_shared_memory(limit, stages):
    assert fitting(Launch(4, 3), resident=15, streamed=10, limit=limit) == Launch(4, stages)
