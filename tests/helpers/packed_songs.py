"""Packed songs for tests: how the fixture `shards` is packed unless told otherwise."""

import numpy as np

from meloformer.data.batches import PackedSongs
from meloformer.tokens import vocab

MAX_BARS = 30


def packed(shards, split="train", max_seq_len=1024, max_bars=MAX_BARS, **more) -> PackedSongs:
    return PackedSongs(shards, split, max_seq_len=max_seq_len, max_bars=max_bars, **more)


def bars_of(ids: np.ndarray) -> int:
    return int(np.count_nonzero(vocab.CHORD.mask(ids)))
