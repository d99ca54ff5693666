"""A step in which all is done by Triton kernels: `Step`, in five launches a layer and four more."""

import torch
import triton

from ...kernels.launch_cache import Launcher
from ...model.inputs import InputFeatures
from ...model.layers import frequencies
from ...model.transformer import MeloFormer
from ...tokens import vocab
from . import draw_kernel, read_kernel
from .fused import FusedForward
from .step import BLOCK, Step

_read, _draw = Launcher(read_kernel.read_kernel), Launcher(draw_kernel.draw_kernel)
_TOKENS = 8192  # that a program compares at once


class FusedStep(Step):
    """`Step` for a model that `fused.has_kernels`; arguments and attributes are the same."""

    recorded = 8  # more take longer to record than they save

    def __init__(self, model: MeloFormer, *arguments, **named):
        super().__init__(model, *arguments, forward=FusedForward, **named)
        config, device = model.config, model.device
        names = tuple(model.feature_embeddings)
        self._uses = sum(1 << InputFeatures._fields.index(name) for name in names)
        first = dict(zip(("token", "inst", *names), self._forward.first.tolist()))
        begins = [first.get(name, 0) for name in ("token", "inst", *InputFeatures._fields)]
        self._first = torch.tensor(begins, device=device)
        self._by_index = config.clocks[0][0]
        self._frequency = torch.cat([frequencies(*clock, device) for clock in config.clocks])
        self._bar = torch.zeros_like(self.pending)
        self._guesses = self._bar.new_zeros((len(self._bar), read_kernel.GUESSES))

    @torch.inference_mode()
    def __call__(self) -> None:
        forward, reader, tables = self._forward, self.reader, self.tables
        rows, slots, width = forward.rows, len(self.pending), self._model.config.dim
        _read(
            (slots,),
            (
                *(rows.x, rows.cos, rows.sin, forward.table, forward.summary, self._frequency),
                *(self.all, self.draft.active, reader.all, tables.of_id, reader.ends, reader.last),
                *(reader.followers, reader.labels, rows.mode, rows.place, rows.past, self._bar),
                *(self._guesses, self._first, reader.tokens, reader.places, reader.bar_of),
                *(reader.inst_of, reader.kind_of, reader.onset_of),
            ),
            (slots, reader.room, reader.bar_room, self.cache.bars),
            WIDTH=width, HALF=rows.dim // 2, BY_INDEX=self._by_index, USES=self._uses,
            DENSE=self._model.config.dense, BLOCK=_TOKENS, WIDTH_BLOCK=triton.next_power_of_2(width),
            HALF_BLOCK=rows.dim // 2, num_warps=8, **rows.overlap,
        )  # fmt: skip
        logits = forward.logits(reader.position, self._bar, reader.inst, self._guesses)
        draft, grammar, sampling = self.draft, self.draft.grammar, self.sampling
        copies = draft.copies
        _draw(
            (slots,),
            (
                *(logits, rows.mode, self.all, draft.all, grammar.all, sampling.all, tables.of_id),
                *(tables.steps, tables.parts, draft.within, draft.pitches, draft.chords, draft.of_chords),
                *(draft.of_pitches, draft.density, grammar.place, sampling.temperature, sampling.top_p),
                *(sampling.min_p, sampling.of_kind, self.queue, reader.position, reader.bars, self.drawn),
                *(self.column, copies.all, copies.log, copies.more, copies.starts, copies.penalty),
            ),
            (slots, self.queue.shape[1], copies.log.shape[1]),
            COLUMNS=BLOCK, BLOCK=triton.next_power_of_2(vocab.VOCAB_SIZE), num_warps=8,
            **rows.overlap,
        )  # fmt: skip
