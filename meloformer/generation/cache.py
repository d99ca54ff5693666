"""Keys and values of the songs being written: of tokens, of bars, and side by side as they are seen.

Shape suffixes: L layers, 2 for keys and values, B songs, K lists of keys (`VisibleKeys`), H heads, D channels
of a head. Tensors grow by doubling, so that appending costs the same however long a song is.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..model.transformer import ModelConfig

FIRST_ROOM = 256
_MOST = {torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}  # that values of the model may be beyond


def indices(values: Sequence | np.ndarray, device: torch.device) -> Tensor:
    """Integers of the host as an int64 tensor of `device`, without waiting for it."""
    tensor = torch.as_tensor(np.asarray(values, dtype=np.int64))
    if device.type == "cuda":  # from pinned memory, which can be copied from while the host goes on
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values, at most what caches of `dtype` can hold: what is beyond would become NaN."""
    return values if dtype not in _MOST else values.clamp(-_MOST[dtype], _MOST[dtype])


def _with_room(tensor: Tensor, room: int) -> Tensor:
    """The tensor with at least `room` places in its last dimension but one; new ones are 0."""
    have = tensor.shape[-2]
    if room <= have:
        return tensor
    grown = tensor.new_zeros(*tensor.shape[:-2], max(room, 2 * have), tensor.shape[-1])
    grown[..., :have, :] = tensor
    return grown


class KeyValueCache:
    """Of B songs of any lengths; what a song has beyond its length is never read, or masked.

    Attributes:
        tokens: [L, 2, B, H, tokens, D], in order of the song.
        seen: [L, 2, B * K, H, keys, D], the lists of keys of each song.
        bars_own: [L, 2, B, H, bars, D], by which summaries attend to summaries.
        bars_past: the same shape, what tokens see of summaries (K2 and V2).

    A dense model has `tokens` alone.
    """

    def __init__(self, config: ModelConfig, songs: int, lists: int, dtype: torch.dtype, device: torch.device):
        def empty(rows: int) -> Tensor:
            # Zeros, since what is masked is still multiplied by 0.
            shape = config.layers, 2, rows, config.heads, FIRST_ROOM, config.head_dim
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = empty(songs)
        if not config.dense:
            self.seen, self.bars_own, self.bars_past = empty(songs * lists), empty(songs), empty(songs)

    def make_room(self, tokens: int = 0, seen: int = 0, bars: int = 0) -> None:
        """Room for so many of each in every song."""
        self.tokens = _with_room(self.tokens, tokens)
        if seen:
            self.seen = _with_room(self.seen, seen)
        if bars:
            self.bars_own, self.bars_past = _with_room(self.bars_own, bars), _with_room(self.bars_past, bars)
