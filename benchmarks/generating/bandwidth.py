"""Which bytes a decoding step must read, and how many a device can read: the bound of decoding."""

from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.timing import Timer
from meloformer.generation.visible import VisibleKeys
from meloformer.model.token_reader import TokenReader
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import vocab

TOKEN, SUMMARY = "token", "summary"
BUFFER_BYTES = {"cuda": 2**30, "cpu": 2**28}  # far more than any cache
_LIST_BYTES = 4  # of a place in the lists of `kernels.decode`


class Row(NamedTuple):
    """A token that is read in a step, or a summary that is computed; `places`: how many it sees."""

    stream: str
    places: int


def rows_of_song(ids: np.ndarray, first: int, end: int, config: ModelConfig) -> list[list[Row]]:
    """What reading each of `ids[first:end]` takes: its own row, and before it a summary if it begins a bar.

    Places are counted by the visibility rule, the row's own included: the tokens that it sees and the
    summaries of earlier bars.
    """
    reader, visible = TokenReader(), VisibleKeys(config.near_bars, config.kind_rule)
    rows: list[list[Row]] = []
    bar = 0
    for token in (reader.push(token) for token in ids[:end].tolist()):
        begins_bar, bar = token.bar > bar, token.bar
        if token.position < first:
            visible.push(token)
        elif config.dense:
            rows.append([Row(TOKEN, token.position + 1)])
        else:
            mine = []
            if begins_bar:
                ended = visible.bar_of(bar - 1)
                mine.append(Row(SUMMARY, ended.stop - ended.start + bar))
            rows.append([*mine, Row(TOKEN, bar + len(visible.seen_by(token)))])
    return rows


def steps_of_loop(songs: Iterable[list[list[Row]]]) -> Iterator[list[Row]]:
    """The rows of each step where the host writes songs: a summary is computed in the step of its token."""
    for rows in zip(*songs):
        yield list(chain(*rows))


def steps_of_graphs(songs: Iterable[list[list[Row]]]) -> Iterator[list[Row]]:
    """The same by CUDA graphs: a song has one row in each step."""
    for rows in zip_longest(*(chain(*song) for song in songs)):
        yield [row for row in rows if row is not None]


class StepBytes:
    """Bytes that a step must read from memory, as a lower bound: what each cache could not have kept.

    - Weights, once a step, of each stream that a row belongs to, in their dtype: gains, projections and the
      feed-forward network of each layer; for tokens also the last norm, the output matrix (ids that exist)
      and the gates of copied labels. A summary needs nothing of the last layer after its keys and values.
    - Keys and values in all layers of every place that a row sees, its own included, in the caches' dtype.
    - By CUDA graphs 4 bytes for each of these places, once: the number of the place in the list.

    Not counted: embeddings of the input (a few rows a token), activations, logits, and all that is written.

    Args:
        graphs: whether there are lists of places; without, keys are copied side by side instead.
        int8: whether the matrices of layers have 8 bits, and a step of 16 bits for each output.
        cache_dtype: of keys and values; None: that of the weights.
    """

    def __init__(
        self,
        model: MeloFormer,
        graphs: bool = False,
        int8: bool = False,
        cache_dtype: torch.dtype | None = None,
    ):
        config = model.config
        size = (cache_dtype or model.token_embedding.weight.dtype).itemsize
        self._place = 2 * config.layers * config.dim * size + (_LIST_BYTES if graphs else 0)
        streams = {TOKEN: _weights_of_tokens(model, int8)}
        if not config.dense:
            streams[SUMMARY] = _weights_of_summaries(model, int8)
        self._weights = {frozenset((name,)): sum(sizes.values()) for name, sizes in streams.items()}
        both: dict[str, int] = {}
        for sizes in streams.values():
            both |= sizes
        self._weights[frozenset(streams)] = sum(both.values())

    def __call__(self, rows: list[Row]) -> int:
        if not rows:
            return 0
        return self._weights[frozenset(row.stream for row in rows)] + self._place * sum(
            row.places for row in rows
        )


def _weights_of_tokens(model: MeloFormer, int8: bool) -> dict[str, int]:
    """Bytes of each weight by its name."""
    head = model.token_embedding.weight[: vocab.VOCAB_SIZE]
    sizes = {"norm_out": model.norm_out.weight.nbytes, "head": head.nbytes}
    if model.config.copy_chords:
        sizes["copy_gate"] = model.copy_gate.weight.nbytes
    return sizes | _of_layers(model, ("norm_r", "qkv_r", "out_r", "norm_ffn", "ffn"), int8)


def _weights_of_summaries(model: MeloFormer, int8: bool) -> dict[str, int]:
    last = f"layers.{len(model.layers) - 1}."
    sizes = _of_layers(model, ("norm_s", "qkv_s", "kv2", "out_s", "norm_ffn", "ffn"), int8)
    return {name: n for name, n in sizes.items() if not name.startswith((f"{last}ffn", f"{last}norm_ffn"))}


def _of_layers(model: MeloFormer, parts: tuple[str, ...], int8: bool) -> dict[str, int]:
    return {
        f"layers.{name}": _int8_bytes(weight) if int8 and weight.dim() == 2 else weight.nbytes
        for name, weight in model.layers.named_parameters()
        if name.split(".")[1] in parts
    }


def _int8_bytes(weight: Tensor) -> int:
    return weight.numel() + 2 * len(weight)


def peak(device: torch.device) -> dict[str, float]:
    """Bytes a second of plain passes over a big buffer: `copy` (read and written) and `read` (a sum)."""
    numbers = torch.ones(BUFFER_BYTES[device.type] // 4, device=device)
    other, timer = torch.zeros_like(numbers), Timer(device)
    copied, read = timer(lambda: other.copy_(numbers))["ms"], timer(numbers.sum)["ms"]
    return {"copy": 2e3 * numbers.nbytes / copied, "read": 1e3 * numbers.nbytes / read}
