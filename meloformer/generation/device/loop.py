"""The generation loop where songs are written on the device: the host reads tokens every `BLOCK` steps."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.triton_backend import has_float8, unavailable
from ...model.transformer import MeloFormer
from ...tokens import vocab
from ..draft import Draft
from ..loop import context
from ..sampling import Sampling
from .cache import bytes_of_a_slot
from .draft import MAX_CHORDS, fits
from .kept import Kept, Shape, SlotSet, weights_of
from .step import BLOCK, Step

CACHE_DTYPES = {"model": None, "fp8": torch.float8_e4m3fn}
MAX_SLOTS = 64
TOKENS_A_BAR, LEAST_BARS = 16, 128  # places for summaries: songs have four times as many tokens in a bar
_ROOM = 256  # rooms are multiples
FOR_CACHES = 0.7  # of the memory that is free
_recording = Lock()  # to begin to record empties PyTorch's cache of memory, which no other recording survives


def why_not(draft: Draft) -> str | None:
    """Why a draft must be written by `generation.loop`, in words, if it must."""
    state = draft.state()
    if not fits(state.constraints):
        return f"progressions of more than {MAX_CHORDS} chords"
    if type(state.sampling) is not Sampling:
        return "draws of another kind"
    return None


def require_gpu(device: torch.device) -> None:
    """Raises UserError if steps cannot be recorded as CUDA graphs there."""
    if device.type != "cuda":
        raise UserError(f"--graphs: needs a GPU, and the model is on {device}")


def uses_graphs(asked: bool | None, device: torch.device) -> bool:
    """Whether songs are written here: as `asked`; None: on a GPU.

    Raises:
        UserError: it is asked for, and there is no GPU.
    """
    if asked:
        require_gpu(device)
    return device.type == "cuda" if asked is None else asked


def pick_cache_dtype(name: str, graphs: bool, device: torch.device) -> torch.dtype | None:
    """Of keys and values in slots, by its name in `CACHE_DTYPES`; None: the model's.

    Args:
        graphs: whether songs are written here.

    Raises:
        UserError: there is no such name, or the device cannot convert such numbers.
    """
    if name not in CACHE_DTYPES:
        raise UserError(f"--cache_dtype: must be one of {', '.join(CACHE_DTYPES)}, got {name}")
    if CACHE_DTYPES[name] is None:
        return None
    if not graphs:
        raise UserError(f"--cache_dtype {name}: needs CUDA graphs: a GPU, and no --no-graphs")
    if not has_float8(device):
        raise UserError(f"--cache_dtype {name}: needs an NVIDIA GPU of compute capability 8.9 or newer")
    return CACHE_DTYPES[name]


def cannot_write(drafts: Sequence[Draft], cache_dtype: torch.dtype | None = None) -> str | None:
    """Why not all of these drafts can be written in slots: a sentence, or None if they can. It says so, too,
    if caches are then not of the `cache_dtype` that was asked for."""
    reasons = [reason for reason in map(why_not, drafts) if reason is not None]
    if not reasons:
        return None
    caches = "" if cache_dtype is None else ", and with caches of the model's dtype"
    return f"without CUDA graphs, which cannot yet write {reasons[0]}{caches}"


def write_on_device(
    model: MeloFormer,
    drafts: Sequence[Draft],
    max_context: int,
    attention: str,
    kept: Kept | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Iterator[int]:
    """As `generation.loop.write`, of drafts that `cannot_write` says nothing against.

    Args:
        kept: where slots are taken from if some that serve are there, and kept afterwards, however it ends.
            All who use it have one `cache_dtype`.
        cache_dtype: of keys and values; None: the model's.
    """
    slots = Slots(model, drafts, max_context, attention, kept=kept, cache_dtype=cache_dtype)
    try:
        yield from slots.write()
    finally:
        if kept is not None:
            kept.keep(slots.set)


def step_for(model: MeloFormer) -> type[Step]:
    """The kind of step: one of Triton kernels if there are such for the model, on its device."""
    if model.device.type == "cuda" and unavailable(model.device) is None:
        from .fused import has_kernels  # imports triton

        if has_kernels(model.config):
            from .fused_step import FusedStep

            return FusedStep
    return Step


class _Stay(NamedTuple):
    """A song in a slot, from one beginning of it to the next."""

    number: int  # of the draft
    begun: int  # which beginning this is, of all


class _Block(NamedTuple):
    """What the steps of a block drew, which may be on its way, and who was in which slot meanwhile."""

    tokens: Tensor  # [S, BLOCK], on CPU
    full: Tensor  # [S]
    stays: dict[int, _Stay]
    arrived: torch.cuda.Event | None


class Slots:
    """Songs take slots as they become free.

    Args:
        model: in eval mode, on the device where songs are written.
        drafts: which `why_not` says nothing against.
        max_context: the most tokens that the model sees at once.
        attention: name of the backend for passes over whole prompts, or "auto".
        slots: how many songs are written side by side at most.
        graphs: whether steps are recorded as a CUDA graph; None: on a GPU.
        step: the kind of step; None: `step_for` the model.
        queues: by draft the tokens that come next whatever is drawn, for measurements.
        kept, cache_dtype: see `write_on_device`.

    Attributes:
        set: the slots.
    """

    def __init__(
        self,
        model: MeloFormer,
        drafts: Sequence[Draft],
        max_context: int,
        attention: str = "auto",
        slots: int = MAX_SLOTS,
        graphs: bool | None = None,
        step: type[Step] | None = None,
        queues: Sequence[Sequence[int]] = (),
        kept: Kept | None = None,
        cache_dtype: torch.dtype | None = None,
    ):
        self._drafts, self._queues = drafts, queues
        self._cuda = model.device.type == "cuda"
        states = [draft.state() for draft in drafts]
        given = [len(state.given.queue) if state.given is not None else 0 for state in states]
        longest = max(state.most_tokens for state in states)
        room = -(-min(max_context, longest + 1) // _ROOM) * _ROOM
        self._room, self._bars = room, max(room // TOKENS_A_BAR, LEAST_BARS)
        holds = any(any(state.constraints.repetition_penalties.values()) for state in states)
        # Of few lengths, so that slots serve again.
        song = 1 << longest.bit_length() if holds else 0
        queue = 1 << max(*map(len, queues), *given, 0).bit_length() if queues or any(given) else 0
        shape, weights = Shape(min(slots, len(drafts)), room, self._bars, queue, song), weights_of(model)
        found = None if kept is None else kept.take(shape, weights)
        if found is None:
            step = step_for(model) if step is None else step
            most = min(shape.slots, self._most_slots(model, cache_dtype))
            made = step(
                model, most, room, self._bars, attention, queue=queue, song=song, cache_dtype=cache_dtype
            )
            graphs = self._cuda if graphs is None else graphs
            run = Graph(made) if graphs else partial(_repeat, made, BLOCK)
            found = SlotSet(made, run, shape, weights)
        self.set, self.step, self._run = found, found.step, found.run
        self._waiting = deque(range(len(drafts)))
        self._stays: dict[int, _Stay] = {}  # by slot
        self._begun = 0

    def _most_slots(self, model: MeloFormer, cache_dtype: torch.dtype | None) -> int:
        """For how many songs there is memory, at least one."""
        if not self._cuda:
            return MAX_SLOTS
        free, _ = torch.cuda.mem_get_info(model.device)
        dtype = model.token_embedding.weight.dtype if cache_dtype is None else cache_dtype
        return max(1, int(free * FOR_CACHES / bytes_of_a_slot(model.config, self._room, self._bars, dtype)))

    def write(self) -> Iterator[int]:
        """As `generation.loop.write`; tokens come `BLOCK` steps at a time."""
        self._fill()
        block = self._launch()
        while block.stays or self._waiting:
            following = self._launch()  # the device goes on while the host looks at what came
            if block.arrived is not None:
                block.arrived.synchronize()
            for slot, stay in block.stays.items():
                draft = self._drafts[stay.number]
                for token in block.tokens[slot].tolist():
                    if token >= 0 and not draft.finished and draft.take(token):
                        yield stay.number
                if self._stays.get(slot) == stay:  # and has not begun anew since the block was launched
                    self._look_at(slot, stay.number, full=bool(block.full[slot]))
            self._fill()
            block = following

    def _launch(self) -> _Block:
        self._run()
        arrived, step = None, self.step
        tokens, full = (x.to("cpu", copy=True, non_blocking=self._cuda) for x in (step.drawn, step.full))
        if self._cuda:
            arrived = torch.cuda.current_stream(step.drawn.device).record_event()
        return _Block(tokens, full, dict(self._stays), arrived)

    def _look_at(self, slot: int, number: int, full: bool) -> None:
        """After the tokens of a block: begin anew what is full, and end what is finished."""
        draft = self._drafts[number]
        if full:
            draft.append_given()
        if not draft.finished and full:
            self._begin(slot, number, self._window(np.array(draft.ids), again=True))
        if draft.finished:
            self.step.end(slot)
            del self._stays[slot]

    def _fill(self) -> None:
        free = [slot for slot in range(len(self.step.pending)) if slot not in self._stays]
        while free and self._waiting:
            number = self._waiting.popleft()
            draft = self._drafts[number]
            draft.append_given()  # is read at once, up to where the model writes
            if draft.finished:
                continue
            self._begin(free[0], number, self._window(np.array(draft.ids), again=False))
            if not draft.finished:
                free.pop(0)

    def _begin(self, slot: int, number: int, window: np.ndarray | None) -> None:
        draft = self._drafts[number]
        if window is None:
            draft.end()
            return
        state = draft.state()
        queue = self._queues[number][draft.new_tokens :] if self._queues else ()
        if state.given is not None:
            queue = state.given.queue
        self.step.begin(slot, state, window, queue, self._room, self._bars)
        self._begun += 1
        self._stays[slot] = _Stay(number, self._begun)

    def _window(self, ids: np.ndarray, again: bool) -> np.ndarray | None:
        """What the model sees of a song: see `generation.loop.Window`. None if its last bar is too long."""
        limits = [self._room * 3 // 4] if again else []
        for limit in (*limits, self._room):
            while (window := context(ids, limit)) is not None:
                bars = int(vocab.CHORD.mask(window).sum())
                if bars <= self._bars - (self._bars // 4 if again else 0):
                    return window
                limit = len(window) * 3 // 4
        return None


def _repeat(call: Callable[[], None], times: int) -> None:
    for _ in range(times):
        call()


class Graph:
    """The steps of a block, some of them recorded as a CUDA graph: so many are launched by one call of the
    host, and the first kernel of a step can start while the last one of the step before ends.

    Args:
        step: none of its slots has a song, so that steps change nothing.
    """

    def __init__(self, step: Step):
        self._replays, rest = divmod(BLOCK, step.recorded)
        assert not rest, "a block begins in the first column, as its tokens are read"
        with torch.cuda.device(step.all.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                _repeat(step, 3)  # what is made at the first calls alone must not be recorded
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Another thread may write songs meanwhile: unless told otherwise, what it allocates ends this.
            with _recording, torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                _repeat(step, step.recorded)
            step.clear()

    def __call__(self) -> None:
        _repeat(self._graph.replay, self._replays)
