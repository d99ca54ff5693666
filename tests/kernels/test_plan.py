"""The plan on its own: which pairs its lines hold, against the oracle."""

from random import Random

import pytest
import torch

from meloformer.kernels import plan as plan_module
from meloformer.kernels.plan import BLOCK, Plan, layout_classes
from meloformer.kernels.structure import Kind, Structure

from helpers.attention_cases import (
    CASES,
    FULL_COLUMNS,
    NEW_RULES,
    SEES,
    Token,
    case,
    dense_case,
    facts,
    oracle_masks,
    song,
    structure,
)
from helpers.plan_cases import DEVICE, Room, coverage


@pytest.fixture(autouse=True)
def forget_capacities():
    plan_module._capacities.clear()


def check_coverage(plan: Plan, mask: torch.Tensor):
    """Each visible pair in one tile of one pass, no invisible one in any, and both directions agree."""
    near, far, near_by_keys, far_by_keys = coverage(plan)
    assert torch.equal(near + far, mask.long())
    assert torch.equal(near, near_by_keys) and torch.equal(far, far_by_keys)


@pytest.mark.parametrize("name", CASES)
def test_every_visible_pair_is_covered_once(name):
    masks = case(name)
    check_coverage(Plan(masks.structure.to(DEVICE)), masks.regular_mask)


def test_full_tiles():
    packed = structure(FULL_COLUMNS)
    plan, mask = Plan(packed.to(DEVICE)), dense_case(packed).regular_mask
    check_coverage(plan, mask)
    statistics = plan.statistics()
    assert statistics["full"] > 0
    assert statistics["visible"] == int(mask.sum()) < statistics["computed"]


def test_columns_that_half_a_block_sees_are_not_full():
    """128 keys that the first half of a block sees; the second half is of another document."""
    batch = [[[Token(0, 0, Kind.P, i) for i in range(length)] for length in (160, 40)]]
    check_coverage(Plan(structure(batch).to(DEVICE)), oracle_masks(batch)[1])


@pytest.mark.parametrize("length", [None, 700], ids=["part of a block", "padding"])
def test_lines_have_no_more_tiles_than_their_columns_need(length):
    """Columns that all tokens of a line see are full, by queries and by keys; slots without a token do not
    count against it."""
    packed = structure(FULL_COLUMNS, length=length)
    assert packed.doc.shape[1] % BLOCK
    plan = Plan(packed.to(DEVICE)).finalize()
    near, far, *_ = (mask[0].bool() for mask in coverage(plan))
    q, k, m = plan.q_blocks, plan.k_blocks, plan.summaries
    near_q, near_k, far_slots = plan.order.view(-1, BLOCK).long().cpu().split([q, k, q])
    groups = [(near_q, near, False), (far_slots, far, False), (near_k, near, True), (far_slots, far, True)]
    expected = []
    for blocks, mask, by_keys in groups:
        for slots in blocks:
            slots = slots[slots >= 0]
            seen = mask[:, slots].T if by_keys else mask[slots - m]
            some, every = int(seen.any(0).sum()), int(seen.all(0).sum()) if len(slots) else 0
            full = every // BLOCK * BLOCK
            masked = -(-(some - full) // BLOCK)
            expected.append([masked, masked + full // BLOCK])
    assert plan.table[:, 2:].tolist() == expected
    by_keys = expected[2 * q :]
    assert any(tiles > masked for masked, tiles in by_keys), "no full tiles: this tests nothing"


@pytest.mark.parametrize("near_bars", [(), (0,), (3, 0, 3), (1, 7, 40)], ids=str)
def test_near_bars(near_bars):
    batch = [[song(Random(1), 9, (0, 33), resting=0.2)]]
    packed = Structure.build(**facts(batch), near_bars=near_bars, kind_rule="alike")
    check_coverage(Plan(packed.to(DEVICE)), oracle_masks(batch, near_bars)[1])


@pytest.mark.parametrize("kind_rule", NEW_RULES)
@pytest.mark.parametrize("name", ["documents", "257_tokens"])
def test_kind_rules(name, kind_rule):
    masks = case(name, kind_rule=kind_rule)
    check_coverage(Plan(masks.structure.to(DEVICE)), masks.regular_mask)


def test_blocks_of_one_kind_see_blocks_of_another():
    """A row for each pair of kinds by `next`: nothing but the kind tells that these blocks see each other."""

    def block(bar, kind):
        return [Token(bar, 5, kind, bar * BLOCK + i) for i in range(BLOCK)]

    pairs = [(query, key) for query, keys in SEES["next"].items() for key in sorted(keys)]
    batch = [[block(0, key) + block(1, query)] for query, key in pairs]
    plan = Plan(structure(batch, kind_rule="next").to(DEVICE))
    check_coverage(plan, oracle_masks(batch, kind_rule="next")[1])


@pytest.mark.parametrize("kind_rule", SEES)
def test_tokens_of_a_class_are_treated_alike(kind_rule):
    """As queries, as keys, as both; and as few classes as that takes, structural tokens among them."""
    rule = {kind: {*seen, Kind.STRUCTURAL} for kind, seen in SEES[kind_rule].items()}
    rule[Kind.STRUCTURAL] = {*Kind}
    sees = {kind: (seen, {q for q in rule if kind in rule[q]}) for kind, seen in rule.items()}
    for classes, treatment in zip(layout_classes(kind_rule), (lambda x: x[0], lambda x: x[1], lambda x: x)):
        assert classes[Kind.STRUCTURAL] == min(classes) == 1
        for one in sees:
            for other in sees:
                alike = treatment(sees[one]) == treatment(sees[other])
                assert (classes[one] == classes[other]) == alike, (one, other)


@pytest.mark.parametrize("seed, kind_rule", [(0, "alike"), (1, "alike"), (0, "next"), (1, "any")])
def test_tokens_without_any_grammar(seed, kind_rule):
    """Facts drawn at random: the rule on tiles is the rule of `structure`, whatever the tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, length: int = 140) -> torch.Tensor:
        return torch.randint(high, (2, length), generator=generator)

    drawn = {"doc": draw(3).sort().values, "bar": draw(9), "inst": draw(3) + 127, "kind": draw(5)}
    drawn["bar"] = (drawn["doc"] * 9 + drawn["bar"]).sort().values  # ascending within a document
    drawn["doc"][0, 120:] = -1
    packed = Structure.build(**drawn, onset=draw(12), kind_rule=kind_rule)
    check_coverage(Plan(packed.to(DEVICE)), dense_case(packed).regular_mask)


@pytest.mark.parametrize("split", [1, 2, 0])
def test_work_is_complete_and_in_order(split):
    batch = [[song(Random(4), 8, (0, 33), resting=0.1)], [song(Random(5), 3)]]
    plan = Plan(structure(batch).to(DEVICE), split=split).finalize()
    q, k = plan.batch * plan.q_blocks, plan.batch * plan.k_blocks
    needs = plan.needs.tolist()
    for group, lists in enumerate(plan.table.cpu().split([q, q, k, q])):
        taken, total = {}, lists[:, 3]
        items = plan.items[group, : needs[8 + group]].tolist()
        for line, first, end, slot, first_slot, parts, _, _, *tiles in items:
            taken.setdefault(line, []).append((first, end, slot))
            assert slot == (-1 if parts == 1 else first_slot + len(taken[line]) - 1)
            assert tiles[:4] == lists[line].tolist()
        blocks = len(total) // plan.batch
        order = [
            (len(taken[line]) == 1, (len(taken[line]) == 1) * line // blocks, -total[line]) for line in taken
        ]
        assert order == sorted(order)  # split lines; then row by row; the longest first
        assert sorted(taken) == list(range(len(total)))
        for line, parts in taken.items():
            assert [first for first, _, _ in parts] + [total[line]] == [0] + [end for _, end, _ in parts]
            assert all(end - first <= (split or 16) for first, end, _ in parts)
        slots = [item[3] for item in items if item[3] >= 0]
        assert slots == list(range(needs[3 + group]))


@pytest.mark.parametrize("split", [1, 3, 0])
def test_pairs_share_the_full_tiles_that_both_lists_begin_with(split):
    """Two rows of five blocks each, so that the last one of a row stands alone."""
    drum = [Token(8 * (i >= 128), 0, Kind.P, i) for i in range(300)]
    rising = [Token(3 * i // BLOCK, 0, Kind.P, i) for i in range(270)]
    plan = Plan(structure([[drum], [rising]], kind_rule="any").to(DEVICE), split=split).finalize()
    needs, blocks = plan.needs.tolist(), plan.q_blocks
    lists = plan.table[plan.batch * blocks : 2 * plan.batch * blocks].tolist()
    tiles = plan.gathered.view(-1, BLOCK).cpu()
    taken, order, slots = {}, [], []
    for item in plan.items[4, : needs[12]].tolist():
        block, begin, end, slot, first_slot, parts, shared, _, *tiles_of_both = item
        alone = block % blocks + 1 == blocks
        assert tiles_of_both == [*lists[block], *([0] * 4 if alone else lists[block + 1])]
        taken.setdefault(block, []).append((begin, end, shared))
        order.append((parts == 1, (parts == 1) * block // blocks))
        slots += [slot] * (slot >= 0)
        assert slot == (-1 if parts == 1 else first_slot + len(taken[block]) - 1)
    assert order == sorted(order) and slots == list(range(needs[7]))
    assert sorted(taken) == [row * blocks + i for row in range(plan.batch) for i in range(0, blocks, 2)]
    found = 0
    for block, parts in taken.items():
        pair = lists[block : block + min(2, blocks - block % blocks)]
        full = [tiles[first + masked : first + total] for first, _, masked, total in pair]
        alike = 0
        while len(pair) == 2 and alike < min(map(len, full)) and torch.equal(full[0][alike], full[1][alike]):
            alike += 1
        assert {shared for _, _, shared in parts} == {alike}
        places = sum(total for *_, total in pair) - alike
        assert [begin for begin, _, _ in parts] + [places] == [0] + [end for _, end, _ in parts]
        assert all(end - begin <= (split or 16) for begin, end, _ in parts)
        found += alike
    assert found > 0


def test_lines_are_split_by_what_is_computed_at_once_and_long_ones_come_first():
    """Over lines made up for it: nothing else makes lines that long in reasonable time."""
    rows, q_blocks, k_blocks = 3, 5, 6
    lines = rows * (3 * q_blocks + k_blocks)
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 900, (lines,), generator=generator, dtype=torch.int32)
    tiles[::4], tiles[1::4] = 5000, 300
    tiles[2::4] %= 100
    sizes = torch.stack([tiles, torch.zeros_like(tiles), tiles]).to(DEVICE)
    ends = sizes[:2].cumsum(1, dtype=torch.int32)
    items = torch.zeros(5, 4000, 16, dtype=torch.int32, device=DEVICE)
    needs = torch.zeros(plan_module.NEEDS, dtype=torch.int32, device=DEVICE)
    plan_module.work_kernel[1, 4](
        sizes, ends, ends[0].contiguous(), torch.zeros(lines, 4).int().to(DEVICE), items, needs,
        lines, items.shape[1], rows, q_blocks, k_blocks, 0, CHUNK=32, ACROSS=128,
    )  # fmt: skip
    q, k = rows * q_blocks, rows * k_blocks
    for group, total in enumerate(tiles.split([q, q, k, q])):
        at_once, blocks = 64 if group < 2 else 40, k_blocks if group == 2 else q_blocks
        most = int(total.sum()) // at_once
        long = most // rows
        assert most > 16 and long > 16
        of_rows = [(number, block // blocks) for block, number in enumerate(total.tolist())]
        first = sorted(((n, r) for n, r in of_rows if n > long), key=lambda of: -of[0])
        others = sorted((of for of in of_rows if of[0] <= long), key=lambda of: (of[1], -of[0]))
        expected = [n for n, _ in first + others]
        assert any(n > most for n, _ in first) and any(long < n <= most for n, _ in first) and others
        found = []
        for block, _, _, slot, at, parts, *_ in items[group, : needs[8 + group]].tolist():
            assert (slot >= 0) == (parts > 1) and parts == max(-(-int(total[block]) // most), 1)
            if parts == 1 or slot == at:
                found.append(int(total[block]))
        assert found == expected


def test_too_many_rows_are_refused(monkeypatch):
    monkeypatch.setattr(plan_module, "MAX_BATCH", 1)
    with pytest.raises(ValueError, match="at most 1 rows, got 3"):
        Plan(case("rows").structure.to(DEVICE))


def test_two_plans_are_equal():
    packed = case("documents").structure.to(DEVICE)
    first, second = (Plan(packed).finalize() for _ in range(2))
    tiles, masked = (first.needs[i] for i in (1, 2))
    for name in ("order", "table"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(first.gathered[: tiles * BLOCK], second.gathered[: tiles * BLOCK])
    assert torch.equal(first.bits[:masked], second.bits[:masked])


def short_song():
    return structure([[song(Random(6), 6, (0, 33))]]).to(DEVICE)


@pytest.fixture(scope="module")
def enough():
    """A plan of the short song with room for everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_capacities", Room())
        return Plan(short_song(), split=1).finalize()


class TestCapacity:
    @pytest.fixture(autouse=True)
    def nothing_is_known(self, room_for_plans, monkeypatch):
        monkeypatch.setattr(plan_module, "_capacities", {})

    def plan(self, seed=6):
        return Plan(structure([[song(Random(seed), 12, (0, 33))]], length=400).to(DEVICE), split=1)

    def test_what_does_not_fit_is_made_again_with_room(self, monkeypatch):
        monkeypatch.setattr(plan_module, "_FIRST_GUESS", 1)
        plan = self.plan()
        first = plan.capacity
        plan.finalize()
        needs = plan.needs.tolist()
        assert needs[1] > first[1], "the guess was enough: this tests nothing"
        assert all(needs[i] <= plan.capacity[i] for i in range(3))

    @pytest.mark.parametrize("short", range(4), ids=["candidates", "tiles", "masked", "slots"])
    def test_each_shortage_is_noticed(self, enough, short):
        """A capacity that is a little too small in one respect gives the plan of one that is not."""
        packed, needs = short_song(), enough.needs.tolist()
        needed = [*needs[:3], max(needs[3:7])]
        needed[short] -= 1
        plan_module._capacities[enough._key] = tuple(needed)
        plan = Plan(packed, split=1)
        assert plan.capacity == tuple(needed)
        check_coverage(plan.finalize(), dense_case(packed.to("cpu")).regular_mask)
        assert plan.needs.tolist() == needs

    @pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
    def test_nothing_is_counted_that_was_not_looked_at(self, enough, share):
        """With too little room for candidates, what comes after sees fewer of them, but never what is not
        there: it would write anywhere."""
        packed = short_song()
        candidates, tiles, masked, *_ = needs = enough.needs.tolist()
        some = int(share * candidates)
        plan_module._capacities[enough._key] = (some, tiles, masked, max(needs[3:7]))
        fill = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # with the highest number
        try:
            plan = Plan(packed, split=1)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = fill
        assert plan.capacity[0] == some
        found = plan.needs.tolist()
        assert found[0] == candidates and 0 < found[1] <= tiles and 0 < found[2] <= masked
        assert plan.finalize().needs.tolist() == needs

    def test_later_plans_have_room_from_the_start(self):
        self.plan().finalize()
        second = self.plan(seed=7)
        before = second.capacity
        assert second.finalize().capacity == before
