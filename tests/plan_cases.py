"""Passes as dense masks and back, pair by pair: what the plan and the kernels are judged by."""

import torch
from torch import Tensor

from meloformer.kernels.plan import Lines, Lists, Pass
from meloformer.kernels.tiling import PassTiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels run: compiled or interpreted


def unpack(words: Tensor, columns: int) -> Tensor:
    """int32 [words, side] -> bool [side, columns], column c in bit c % 32 of word c / 32."""
    return torch.stack([(words[c // 32] >> (c % 32)) & 1 for c in range(columns)], dim=1).bool()


def pack(mask: Tensor) -> Tensor:
    """bool [side, columns] -> int32 [words, side], the inverse of `unpack`."""
    words = torch.zeros(-(-mask.shape[1] // 32), mask.shape[0], dtype=torch.int64)
    for c in range(mask.shape[1]):
        words[c // 32] |= mask[:, c].long() << (c % 32)
    return words.to(torch.int32)  # the highest bit becomes the sign


def coverage(p: Pass, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """How often the lists by queries, and those by keys, hold each pair: int [B, queries, keys]."""
    m, n = p.tiles.block_m, p.tiles.block_n
    by_queries = _covered(p.queries, p.query_order, p.key_order, m, n, num_queries, num_keys)
    by_keys = _covered(p.keys, p.key_order, p.query_order, n, m, num_keys, num_queries)
    return by_queries, by_keys.transpose(1, 2)


def _covered(
    lines: Lines, order: Tensor, other: Tensor, side: int, other_side: int, length: int, other_length: int
) -> Tensor:
    rows = len(order)
    out = torch.zeros(rows, length + 1, other_length + 1, dtype=torch.int64)  # -1 falls on the last
    order, other = order.long().cpu(), other.long().cpu()
    blocks, partial, total, start = (
        x.tolist() for x in (lines.blocks, lines.partial, lines.total, lines.start)
    )
    bits = lines.bits.cpu()
    num_lines = order.shape[1] // side
    for line in range(rows * num_lines):
        row, block = divmod(line, num_lines)
        own = order[row, block * side :][:side]
        for i in range(total[line]):
            seen = other[row, blocks[line * lines.length + i] * other_side :][:other_side]
            tile = torch.ones(side, other_side, dtype=torch.bool)
            if i < partial[line]:
                tile = unpack(bits[start[line] + i], other_side)
                assert tile.any() and not tile.all(), "not a partial tile"
            out[row, own[:, None], seen[None, :]] += tile
    assert not out[:, -1].any() and not out[:, :, -1].any(), "a slot without a token is visible"
    return out[:, :-1, :-1]


def pass_of_mask(
    mask: Tensor, num_summaries: int, tiles: PassTiles, split: int, first: bool = True, seed: int = 0
) -> Pass:
    """A pass over the pairs of `mask` [B, Q, K], tokens in random order; the first keys are summaries."""
    generator = torch.Generator().manual_seed(seed)
    rows, num_queries, num_keys = mask.shape
    m, n = tiles.block_m, tiles.block_n

    def shuffled(start: int, stop: int, block: int) -> Tensor:
        order = torch.full((rows, -(-(stop - start) // block) * block), -1)
        for row in order:
            row[: stop - start] = torch.randperm(stop - start, generator=generator) + start
        return order

    queries = shuffled(0, num_queries, m)
    keys = torch.cat([shuffled(0, num_summaries, n), shuffled(num_summaries, num_keys, n)], dim=1)
    row = torch.arange(rows)[:, None, None]
    laid_out = mask[row, queries[:, :, None], keys[:, None, :]]
    laid_out &= (queries >= 0)[:, :, None] & (keys >= 0)[:, None, :]
    blocked = laid_out.unflatten(2, (-1, n)).unflatten(1, (-1, m)).transpose(2, 3)  # [B, qb, kb, m, n]
    types = blocked.flatten(-2).any(-1).to(torch.int8) + blocked.flatten(-2).all(-1).to(torch.int8)

    lists = Lists(types.to(DEVICE), split, first)
    partial, *work = lists.counts.tolist()
    bits, key_bits = lists.empty_bits(partial, tiles)
    for b, i, j in (types == 1).nonzero().tolist():
        earlier = int((types[b, i, :j] == 1).sum())
        bits[lists.start[b * types.shape[1] + i] + earlier] = pack(blocked[b, i, j]).to(DEVICE)
        earlier = int((types[b, :i, j] == 1).sum())
        key_bits[lists.key_start[b * types.shape[2] + j] + earlier] = pack(blocked[b, i, j].T).to(DEVICE)
    orders = (queries.int().to(DEVICE), keys.int().to(DEVICE))
    return lists.finish(*orders, num_summaries > 0, bits, key_bits, tuple(work), tiles)
