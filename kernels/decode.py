"""A decoding step's layers as five Triton kernels each, on tensors that stay where they are.

Shape suffixes: S rows, one for each song, E model width, H heads, D channels of a head, P places of a song's
keys (`decode_list`), F inner width of the feed-forward network, V columns of the head.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import decode_attention as attention
from . import decode_products as products
from . import overlap
from .decode_list import list_kernel
from .launch import multiprocessors
from .launch_cache import Launcher
from .tiles import LOG2_E

MAX_NEAR_BAR = 30  # the bits of a number that say which bars are near
# Of a tile: what a product of tensor cores has at least, and too few for instructions of warp groups (wgmma),
# by which the products of 64 rows came out wrong on an H200 (Triton 3.6).
_MIN_ROWS, _MAX_ROWS = 16, 32
_PROGRAMS = 1024  # of attention for few songs: as many parts of the lists of keys as make about so many
_MOST_PARTS = 32
_MANY = 8  # songs whose lists are shared out evenly: so many, or more
_EACH = 3  # programs of attention for each multiprocessor, which all run at once, if there are so many songs
_MOST_HEADS = 4  # that a program then takes: tensor cores can attend to as many
_JOINED = 8  # parts of a list that it then joins at once
_TILE, _MANY_TILE = 8192, 8192  # bytes of a tile of keys, for few songs and for many
_WARPS, _MANY_WARPS = 2, 4  # of a program of attention
_STAGES, _MANY_STAGES = 2, 3  # of its loop over the places
_LINES = 64  # of places behind the first block, for few songs, but of keys of 8 bits: see `decode_attention`
_DOT_TILE, _DOT_STAGES = 16384, 5  # in place of _MANY_.., where tensor cores attend: two tiles on their way
_DOT_PLACES = 16  # of a tile that each warp then has at least: a product sums as many
# Tiles that take as long as a program takes longer for every song that begins in its share.
_MANY_BEGINS, _DOT_BEGINS = 0, 1
_LARGEST = {torch.float8_e4m3fn: 448}  # key or value that can be stored, where the model's may be beyond
_MANY_OVERLAP = products.LATE  # when the next kernel starts, of several songs: see `decode_products.begin`
_REGISTERS = 65536  # of a multiprocessor of any GPU, for all threads
_DOWN_PARTS = 6  # of the sums of the down projection: it has few columns, and long ones
_WEIGHT_BYTES, _TILE_BYTES = 512, 16384  # of a row of weights that are loaded at once, and of a tile of rows
_BYTES_AHEAD = 98304  # of tiles of rows and weights that are on their way: any GPU has room for them
# Columns of a result that a program takes: of one row, weights must be read by most of a GPU at once.
_PAIRS, _COLUMNS, _DOWN_COLUMNS, _HEAD_COLUMNS = 8, 16, 32, 16
_ROW_PAIRS, _ROW_COLUMNS, _ROW_DOWN_COLUMNS, _ROW_HEAD_COLUMNS = 2, 8, 2, 8

_list = Launcher(list_kernel)
_attend, _attend_evenly = Launcher(attention.attend_kernel), Launcher(attention.attend_evenly_kernel)
_project, _attended = Launcher(products.project_kernel), Launcher(products.attended_kernel)
_gate, _down, _head = (
    Launcher(kernel) for kernel in (products.gate_kernel, products.down_kernel, products.head_kernel)
)


def overlap_options(device: torch.device, slots: int) -> dict[str, int]:
    """For the launch of a kernel that calls `decode_products.begin`, last of all. With many songs, programs
    that wait take room from those that run, unless they are launched LATE."""
    when = products.EARLY if slots == 1 else _MANY_OVERLAP
    when = when if overlap.can_overlap(device) else 0
    return {"OVERLAPS": when, **overlap.options(when)}


@dataclass(frozen=True)
class Weights:
    """Of one layer, in one dtype: matrices as `torch.nn.Linear` has them, contiguous. Those of `qkv` and
    `gate_up` have the gains of the norm before them multiplied into their columns.

    `out_s` may be that of another layer where nobody reads the summary stream afterwards.
    """

    qkv_r: Tensor
    qkv_s: Tensor
    out_r: Tensor
    out_s: Tensor
    kv2: Tensor
    gate_up: Tensor
    down: Tensor


class Rows:
    """What every layer of a step reads of its rows, and room for what passes between its kernels.

    Args:
        slots: S.
        heads, dim: H, and D: a power of two, 32 or more.
        hidden: F.
        room, bars: of the songs' places, see `decode_list`.

    Attributes:
        mode: int64 [S], READS or SUMMARIZES, or 0 for a row without a song.
        place, past: int64 [S], where its keys and values go, and those that tokens will see of its summary.
        cos, sin: [S, D / 2] in the dtype of the weights.
        x: [S, E], the stream.
        overlap: of every launch, see `overlap_options`.
        list: int32 [S, P], the visible places of each song; count: how many there are, int64 [S].
        group: int64 [S], what the list was made for; -1 makes it anew.
    """

    def __init__(
        self,
        slots: int,
        heads: int,
        dim: int,
        hidden: int,
        room: int,
        bars: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        if dim < 32 or dim & (dim - 1):
            raise ValueError(f"heads must have a power of two of channels, 32 or more, got {dim}")

        def integers() -> Tensor:
            return torch.full((slots,), -1, dtype=torch.int64, device=device)

        def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros((slots, *shape), dtype=dtype, device=device)

        self.slots, self.heads, self.dim, self.hidden = slots, heads, dim, hidden
        self.room, self.bars, self.places = room, bars, room + 2 * bars + 1
        self.overlap = overlap_options(device, slots)
        self._many = slots >= _MANY
        self._group = min(_MOST_HEADS, heads & -heads) if self._many else 1
        self._splits = max(1, min(_MOST_PARTS, triton.next_power_of_2(_PROGRAMS // (slots * heads) + 1) // 2))
        self._shares = max(1, multiprocessors(device) * _EACH * self._group // heads)
        self.mode, self.place, self.past, self.count, self.group = (integers() for _ in range(5))
        self.list = numbers(self.places, dtype=torch.int32)
        self.cos, self.sin = numbers(dim // 2), numbers(dim // 2)
        self.x, self._q, self._attended = (numbers(heads * dim) for _ in range(3))
        self._hidden = numbers(hidden)
        parts = 2 * self._shares if self._many else slots * self._splits
        shapes = (parts, heads, dim), (parts, heads), (parts, heads)
        self._parts = [torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes]
        self._done = numbers(heads, dtype=torch.int32)
        self._rows = 1 if slots == 1 else min(_MAX_ROWS, max(_MIN_ROWS, triton.next_power_of_2(slots)))
        self._tiles = triton.cdiv(slots, self._rows)
        one = self._rows == 1
        self._pairs = min(_ROW_PAIRS if one else _PAIRS, dim // 2)
        self._columns = _ROW_COLUMNS if one else _COLUMNS
        self._down_columns = _ROW_DOWN_COLUMNS if one else _DOWN_COLUMNS
        self._head_columns = _ROW_HEAD_COLUMNS if one else _HEAD_COLUMNS
        self._down_parts = 1 if one else _DOWN_PARTS
        sums = (self._down_parts, slots, heads * dim)
        self._down_sums = torch.zeros(sums, dtype=torch.float32, device=device)
        tiles = (triton.cdiv(heads * dim, self._down_columns), self._tiles)
        self._down_done = torch.zeros(tiles, dtype=torch.int32, device=device)

    def find_places(
        self,
        bar_of: Tensor,
        inst_of: Tensor,
        kind_of: Tensor,
        position: Tensor,
        bar: Tensor,
        inst: Tensor,
        near_bars: tuple[int, ...],
        dense: bool = False,
    ) -> None:
        """Bring `list` and `count` up to date: the bar rule of `structure.regular_sees`, and `summary_sees`.

        Args:
            bar_of, inst_of, kind_of: int32 [S, room + 1], of all tokens of each song.
            position, bar, inst: int64 [S], of the last token; for rows that summarize the bar that they do.
            near_bars: distances, at most `MAX_NEAR_BAR`.
            dense: every token sees all before it, and there are no summaries.
        """
        tensors = bar_of, inst_of, kind_of, self.mode, position, bar, inst, self.group, self.list, self.count
        near = sum(1 << distance for distance in near_bars)
        _list(
            (self.slots,), tensors, (self.room, self.bars),
            NEAR=near, ALL=dense, BLOCK=2048, num_warps=8, **self.overlap,
        )  # fmt: skip

    def layer(self, weights: Weights, keys: Tensor, eps: float) -> None:
        """Let `x` pass a layer; `keys` [2, S, P, H, D] gets keys and values of the rows.

        They have the dtype of `x`, or float8_e4m3fn, which needs `triton_backend.has_float8`.
        """
        w, heads, half = weights, self.heads, self.dim // 2
        width, rows, pairs = heads * self.dim, self._rows, self._pairs
        blocks = heads * half // pairs
        one, most = rows == 1, _LARGEST.get(keys.dtype, 0)
        _project(
            (3 * blocks, self._tiles, 1 if one or not self.bars else 2),
            (
                *(self.x, w.qkv_r, w.qkv_s, self.cos, self.sin, self.mode, self.place),
                *(self._q, keys),
            ),
            (self.slots, self.places, eps),
            HEADS=heads, HALF=half, MOST=most, ROWS=rows, PAIRS=pairs,
            **self._tile(width, 2 * pairs), **self.overlap,
        )  # fmt: skip
        self._attend_lists(keys)
        _attended(
            (blocks, self._tiles, 1 if not self.bars else 3 if one else 4),
            (
                *(self._attended, w.out_r, w.out_s, w.kv2, self.cos, self.sin, self.mode, self.past),
                *(self.x, keys),
            ),
            (self.slots, self.places),
            HEADS=heads, HALF=half, MOST=most, ROWS=rows, PAIRS=pairs,
            **self._tile(width, 2 * pairs), **self.overlap,
        )  # fmt: skip
        _gate(
            (triton.cdiv(self.hidden, self._columns), self._tiles),
            (self.x, w.gate_up, self._hidden),
            (self.slots, eps),
            WIDTH=width, HIDDEN=self.hidden, ROWS=rows, COLUMNS=self._columns,
            **self._tile(width, 2 * self._columns), **self.overlap,
        )  # fmt: skip
        _down(
            (*self._down_done.shape, self._down_parts),
            (self._hidden, w.down, self.x, self._down_sums, self._down_done),
            (self.slots,),
            WIDTH=width, HIDDEN=self.hidden, ROWS=rows, COLUMNS=self._down_columns, SPLITS=self._down_parts,
            **self._tile(triton.cdiv(self.hidden, self._down_parts), self._down_columns), **self.overlap,
        )  # fmt: skip

    def _attend_lists(self, keys: Tensor) -> None:
        """From `_q` to `_attended`; `keys` as `layer` has them."""
        tile, warps, stages = _TILE, _WARPS, _STAGES
        if self._many:
            tile, warps, stages = _MANY_TILE, _MANY_WARPS, _MANY_STAGES
        line = self._group * self.dim  # numbers
        size = keys.element_size()
        dots = self._many and size == 1 and self._q.element_size() == 2
        if dots:
            tile, stages = _DOT_TILE, _DOT_STAGES
        block = max(1, tile // (line * size))
        if dots:
            block = max(block, _DOT_PLACES)
            warps = min(warps, block // _DOT_PLACES)
        lines = max(1, warps * 32 * 16 // (line * size))  # all threads load 16 bytes at once
        if not self._many and size > 1:  # of few tiles no place need wait for another, if registers suffice
            lines = _LINES
        lines = min(block, lines)
        shapes = {"BLOCK": block, "LINES": lines, "STAGES": stages, "KEYS": size}
        options = {"num_warps": warps, **self.overlap}
        given, made = (self._q, keys, self.list, self.count), (self._attended, *self._parts, self._done)
        numbers = self.slots, self.places, self.dim**-0.5 * LOG2_E
        heads = {"HEADS": self.heads, "GROUP": self._group, "DIM": self.dim}
        groups = self.heads // self._group
        if self._many:
            slots = triton.next_power_of_2(self.slots)
            programs = self._shares, groups
            heads |= {"SLOTS": slots, "PARTS": _JOINED}
            registers = min(255, _REGISTERS // (_EACH * warps * 32) // 8 * 8)
            shapes |= {"DOTS": warps if dots else 0, "BEGINS": _DOT_BEGINS if dots else _MANY_BEGINS}
            _attend_evenly(
                programs, (*given, *made), numbers, **heads, **shapes, **options, maxnreg=registers
            )
        else:
            programs = self.slots, groups, self._splits
            tensors = *given, self.place, *made
            _attend(programs, tensors, numbers, **heads, SPLITS=self._splits, **shapes, **options)

    def _tile(self, width: int, columns: int) -> dict[str, int]:
        """How many channels of `width` a program loads at once, and how far ahead, for `columns` of weights.

        Of one row all; else as many as fit the shared memory of any GPU, since a program loads little and
        would wait for memory several times.
        """
        if self._rows == 1:
            return {"BLOCK": triton.next_power_of_2(width), "STAGES": 1, "num_warps": 4}
        size = self.x.element_size()
        least = max(triton.next_power_of_2(width), _MIN_ROWS)  # what a product needs along any side
        block = min(_WEIGHT_BYTES // size, _TILE_BYTES // (self._rows * size), least)
        stages = min(1 + triton.cdiv(width, block), _BYTES_AHEAD // (block * (self._rows + columns) * size))
        return {"BLOCK": block, "STAGES": max(2, stages), "num_warps": 4}

    def logits(self, weight: Tensor, gates: Tensor, guesses: Tensor, eps: float) -> Tensor:
        """Of the stream `x`, float32 [S, V].

        Args:
            weight: [V, E], with the gains of the last norm multiplied into its columns.
            gates: [G, E], G of 0 to 16, the same.
            guesses: int64 [S, G]; a column above 0 gets the product with its gate added.
        """
        out = self.x.new_empty((self.slots, len(weight)), dtype=torch.float32)
        width, columns = self.heads * self.dim, self._head_columns
        _head(
            (triton.cdiv(len(weight), columns), self._tiles),
            (self.x, weight, gates, guesses, out),
            (self.slots, len(weight), eps),
            WIDTH=width, GUESSES=len(gates), ROWS=self._rows, COLUMNS=columns,
            **self._tile(width, columns + 16), **self.overlap,
        )  # fmt: skip
        return out
