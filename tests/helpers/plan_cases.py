"""Converts plans to dense masks and back, pair by pair, to test the plan and the kernels against."""

import torch
from torch import Tensor

from meloformer.kernels.plan import BLOCK, Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels run: compiled or interpreted


class Room(dict):
    """Capacities of plans by shape: of a shape that has none yet, what nearly every batch can do with.

    Tests use many shapes once; a plan that knows nothing is made twice, with a guess and with what it needs.
    """

    def get(self, key, default=None):
        if key not in self:
            _, batch, summaries, regular, _ = key
            q_blocks, s_blocks = -(-regular // BLOCK), -(-summaries // BLOCK)
            pairs = 2 * batch * q_blocks * (2 * q_blocks + s_blocks)  # of blocks, by queries and by keys
            lists = batch * (4 * q_blocks + s_blocks)
            self[key] = (pairs, pairs + lists, pairs + lists, pairs)
        return self[key]


def bit_of(column: int) -> int:
    return 4 * (column % 8) + column % 32 // 8


def unpack(words: Tensor) -> Tensor:
    """int32 [2, 64] -> bool [64, 64]: two words of 32 columns for each row."""
    return torch.stack([(words[c // 32] >> bit_of(c)) & 1 for c in range(BLOCK)], dim=1).bool()


def pack(mask: Tensor) -> Tensor:
    """bool [64, 64] -> int32 [2, 64], the inverse of `unpack`."""
    words = torch.zeros(2, BLOCK, dtype=torch.int64)
    for c in range(BLOCK):
        words[c // 32] |= mask[:, c].long() << bit_of(c)
    return words.to(torch.int32)  # the highest bit becomes the sign


def coverage(plan: Plan) -> list[Tensor]:
    """How often each group of lines holds each pair: int [B, queries, M + N], of near and far by queries,
    then by keys."""
    plan.finalize()
    b, q, k = plan.batch, plan.q_blocks, plan.k_blocks
    order = plan.order.view(-1, BLOCK).long().cpu()
    near_q, near_k, far = order.split([b * q, b * k, b * q])
    lines = plan.table.tolist()
    out, first = [], 0
    for slots, by_keys in ((near_q, False), (far, False), (near_k, True), (far, True)):
        out.append(_covered(plan, slots, lines[first : first + len(slots)], by_keys))
        first += len(slots)
    return out


def _covered(plan: Plan, slots: Tensor, lines: list[list[int]], by_keys: bool) -> Tensor:
    m, n = plan.summaries, plan.regular
    own, other = (m + n, n) if by_keys else (n, m + n)
    out = torch.zeros(plan.batch, own + 1, other, dtype=torch.int64)  # the extra last row takes index -1
    tokens, bits = plan.gathered.view(-1, BLOCK).long().cpu(), plan.bits.cpu()
    for i, (first, first_masked, masked, tiles) in enumerate(lines):
        row = i // (len(lines) // plan.batch)
        rows = slots[i] if by_keys else torch.where(slots[i] >= 0, slots[i] - m, -1)
        for tile in range(tiles):
            seen = torch.ones(BLOCK, BLOCK, dtype=torch.bool)
            if tile < masked:
                seen = unpack(bits[first_masked + tile])
                assert not seen[rows < 0].any(), "a slot without a token sees something"
            columns = tokens[first + tile]
            used = seen.any(0) if tile < masked else torch.ones(BLOCK, dtype=torch.bool)
            assert tile < masked - 1 or tile >= masked or used.any(), "a tile for nothing"
            out[row].index_put_((rows[:, None], columns[None, used]), seen[:, used].long(), accumulate=True)
    out = out[:, :-1]
    return out.transpose(1, 2) if by_keys else out


class PlanOfMasks:
    """The tensors of a plan over any pairs: `near` and `far` are bool [B, N, M + N], far without summaries.

    Tokens stand in random order. Every line but one in three has its full columns in full tiles.
    """

    def __init__(self, near: Tensor, far: Tensor, summaries: int, split: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        rows, n, _ = near.shape

        def shuffled(start: int, stop: int) -> Tensor:
            order = torch.full((rows, -(-(stop - start) // BLOCK) * BLOCK), -1)
            for row in order:
                row[: stop - start] = torch.randperm(stop - start, generator=generator) + start
            return order

        queries, far_order = shuffled(summaries, summaries + n), shuffled(summaries, summaries + n)
        keys = torch.cat([shuffled(0, summaries), shuffled(summaries, summaries + n)], dim=1)
        groups = [
            (queries, near, False),
            (far_order, far, False),
            (keys, near.transpose(1, 2), True),
            (far_order, far.transpose(1, 2), True),
        ]
        table, tokens, bits, items = [], [], [], []
        for order, mask, by_keys in groups:
            totals, first_line = [], len(table)
            for row, slots in enumerate(order):
                for own in slots.view(-1, BLOCK):
                    columns, tiles = self._line(mask[row], own, by_keys, summaries, len(table) % 3 > 0)
                    table.append([len(tokens), len(bits), len(tiles), len(columns)])
                    tokens += columns
                    bits += tiles
                    totals.append(len(columns))
            group = []
            for line in sorted(range(len(totals)), key=lambda i: (-totals[i], i)):
                parts, first = max(-(-totals[line] // split), 1), len(group)
                for part in range(parts):
                    bounds = [(part + i) * totals[line] // parts for i in (0, 1)]
                    slot = len(group) if parts > 1 else -1
                    lists = [*table[first_line + line], 0, 0, 0, 0]
                    group.append([line, *bounds, slot, first, parts, 0, 0, *lists])
            items.append(group)
        items.append(self._pairs(table[len(queries) * queries.shape[1] // BLOCK :], tokens, far_order, split))

        k_lines = rows * (keys.shape[1] // BLOCK)
        slots = max(sum(item[3] >= 0 for item in group) for group in items)
        padded = torch.full((5, k_lines + slots, 16), 10**6)
        for out, group in zip(padded, items):
            out[: len(group)] = torch.tensor(group)
        self.tensors = tuple(
            x.to(torch.int32).to(DEVICE)
            for x in (
                torch.cat([queries.flatten(), keys.flatten(), far_order.flatten()]),
                torch.stack([*tokens, torch.zeros(BLOCK, dtype=torch.int64)]).flatten(),
                torch.stack([*bits, torch.zeros(2, BLOCK, dtype=torch.int32)]),
                padded,
                torch.tensor([0] * 8 + [len(group) for group in items]),
            )
        )

    @staticmethod
    def _pairs(far: list, tokens: list[Tensor], order: Tensor, split: int) -> list[list[int]]:
        """Work items of pairs of lines of the far pass, whose part of the table comes first in `far`."""
        items, blocks = [], order.shape[1] // BLOCK
        for line in (row * blocks + i for row in range(len(order)) for i in range(0, blocks, 2)):
            pair = far[line : line + min(2, blocks - line % blocks)]
            full = [tokens[first + masked : first + tiles] for first, _, masked, tiles in pair]
            shared = 0
            while len(pair) == 2 and all(shared < len(x) for x in full):
                if not torch.equal(full[0][shared], full[1][shared]):
                    break
                shared += 1
            places = sum(tiles for *_, tiles in pair) - shared
            parts, first = max(-(-places // split), 1), len(items)
            for part in range(parts):
                bounds = [(part + i) * places // parts for i in (0, 1)]
                slot = len(items) if parts > 1 else -1
                lists = [number for entry in (*pair, [0] * 4)[:2] for number in entry]
                items.append([line, *bounds, slot, first, parts, shared, 0, *lists])
        return items

    @staticmethod
    def _line(mask: Tensor, own: Tensor, by_keys: bool, summaries: int, gather_full: bool):
        """The columns of each tile, and the mask bits of those that have a mask."""
        real = own >= 0
        rows = torch.where(real, own if by_keys else own - summaries, 0)
        seen = mask[rows] & real[:, None]
        full = seen[real].all(0) & gather_full
        full &= full.cumsum(0) <= int(full.sum()) // BLOCK * BLOCK
        partial = (seen.any(0) & ~full).nonzero()[:, 0]
        nobody = 0 if by_keys else summaries
        columns, bits = [], []
        for start in range(0, len(partial), BLOCK):
            chunk = partial[start : start + BLOCK]
            columns.append(torch.full((BLOCK,), nobody))
            columns[-1][: len(chunk)] = chunk
            tile = torch.zeros(BLOCK, BLOCK, dtype=torch.bool)
            tile[:, : len(chunk)] = seen[:, chunk]
            bits.append(pack(tile))
        columns += list(full.nonzero()[:, 0].view(-1, BLOCK))
        return columns, bits
