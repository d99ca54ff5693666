"""Batches of random songs for tests of training, as large as what kernels are compiled for."""

from random import Random

import torch

from meloformer.data.batches import Batch
from meloformer.kernels.structure import KIND_RULE
from meloformer.tokens.vocab import IGNORE_INDEX

from helpers.attention_cases import Song, count_pairs, song, structure
from helpers.model_cases import random_ids

ROWS, LENGTH, SUMMARIES = 2, 2048, 128


def songs(random: Random, length: int, bars: int, instruments: tuple[int, ...]) -> list[Song]:
    """Songs one after the other, in a row of at most `length` tokens and `bars` bars."""
    row = []
    while length > 0 and bars > 0:
        one = song(random, random.randint(1, 40), instruments, resting=0.5)[:length]
        one = [token for token in one if token.bar < bars]
        row.append(one)
        length, bars = length - len(one), bars - one[-1].bar - 1
    return row


def make_batch(
    seed: int, length: int, bars: int, instruments: tuple[int, ...], room: int = SUMMARIES
) -> Batch:
    random = Random(seed)
    rows = [songs(random, length, bars, instruments) for _ in range(ROWS)]
    packed = structure(rows, LENGTH, room, KIND_RULE)
    ids = random_ids(rows, LENGTH, seed)
    same = packed.doc[:, 1:] == packed.doc[:, :-1]
    targets = torch.full_like(ids, IGNORE_INDEX)
    targets[:, :-1] = ids[:, 1:].where(same & (packed.doc[:, 1:] >= 0), IGNORE_INDEX)
    return Batch(ids, targets, packed, int((targets != IGNORE_INDEX).sum()), count_pairs(packed))


def varied(number: int) -> list[Batch]:
    """Of one shape but for the room for summaries, fuller and denser from first to last: from a third of a
    row in which everybody plays alone to whole rows of one instrument, whose tokens all see each other."""
    batches = []
    for i in range(number):
        part = i / (number - 1)
        instruments = (0, 33, 128, 80, 25, 48)[: 6 - int(5 * part)]
        length = int(LENGTH * (0.3 + 0.7 * part))
        bars = Random(i).randint(SUMMARIES // 2 + 1, SUMMARIES)
        room = SUMMARIES + 32 * (i % 2) + 64 * (i > number // 2)  # four sizes, two of them late
        batches.append(make_batch(i, length, bars, instruments, room))
    return batches
