"""Generating songs from a program: load a checkpoint once, then ask for songs or for bars as they come."""

import os
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import miditoolkit
import numpy as np
import torch

from ..midi.writer import write_midi
from ..model.device import pick_attention, pick_device
from ..model.transformer import MeloFormer
from ..tokens import attributes, vocab
from ..tokens.tokenizer import HIDTokenizer
from .constraints import Constraints
from .device.kept import Kept
from .device.loop import cannot_write, pick_cache_dtype, uses_graphs, write_on_device
from .draft import DEFAULT_MAX_TOKENS, UNCONSTRAINED, Draft
from .load import load_model
from .loop import MAX_CONTEXT, write
from .sampling import DEFAULT_SAMPLING, Sampling
from .sound import Synthesizer

Prompt = np.ndarray | str | os.PathLike | miditoolkit.MidiFile


@dataclass(frozen=True, eq=False)
class Song:
    """A song that was generated.

    ids: token ids, uint16 [n], from BOS to EOS; the prompt's come first.
    seed: with which it was drawn.
    """

    ids: np.ndarray
    seed: int

    def midi(self) -> miditoolkit.MidiFile:
        return HIDTokenizer().decode(self.ids)

    def save(self, path: str | os.PathLike) -> None:
        """Write it as a MIDI file, whole or not at all."""
        write_midi(self.midi(), path)

    def save_wav(self, path: str | os.PathLike, soundfont: str | os.PathLike | None = None) -> None:
        """Write it as audio: stereo, 16 bits, whole or not at all.

        Args:
            soundfont: a .sf2 or .sf3 file; None takes the one that the environment variable SOUNDFONT names,
                or one that is installed.

        Raises:
            UserError: no synthesizer or no SoundFont is there; the message says how to get one.
        """
        Synthesizer.find(soundfont).write_wav(self.midi(), path)


@dataclass(frozen=True, eq=False)
class Bar:
    """A bar that is complete: nothing more will be added to it.

    song: number of its song, from 0.
    number: of the bar among the new ones of its song, from 0. The parts of a bar longer than 8 quarters are
        one.
    ids: its token ids, uint16 [n], from its CHORD on. The first bar of a song states TS and BPM, unless there
        was a prompt; later bars state what changes.
    so_far: the song up to the end of this bar, with prompt, BOS and EOS: a valid song.
    """

    song: int
    number: int
    ids: np.ndarray
    so_far: np.ndarray


class Generator:
    """Writes songs with a model. Made by `load`, or from a model in eval mode.

    Args:
        model: in eval mode; its device is where everything is computed.
        max_context: the most tokens that it sees at once, best those of the rows it was trained on. A longer
            song goes on with a window of whole bars.
        attention: name of the backend for passes over whole prompts, or "auto".
        graphs: write by CUDA graphs, many tokens between two looks of the host; None, the default, does so on
            a GPU. What is drawn differs from what is drawn without. Slots and graph are kept for the next
            call that they serve, and with them their memory, as long as there is the generator.
        cache_dtype: by graphs, of keys and values: "model", or "fp8", half the memory of bfloat16.

    Raises:
        UserError: the backend cannot be used, there is no GPU for `graphs`, or for "fp8" no graphs or an
            older GPU.
    """

    def __init__(
        self,
        model: MeloFormer,
        max_context: int = MAX_CONTEXT,
        attention: str = "auto",
        graphs: bool | None = None,
        cache_dtype: str = "model",
    ):
        self._graphs = uses_graphs(graphs, model.device)
        self._cache_dtype = pick_cache_dtype(cache_dtype, self._graphs, model.device)
        self.model, self.max_context = model, max_context
        self._attention = pick_attention(attention, model.device, model.config)
        self._kept = Kept()

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        device: str | torch.device = "auto",
        attention: str = "auto",
        graphs: bool | None = None,
        cache_dtype: str = "model",
    ) -> "Generator":
        """From a checkpoint, an export, or the output folder of a training run.

        Args:
            device: auto, cpu, cuda or cuda:N; auto is a GPU if there is one.
            attention: see `Generator`.
            graphs: see `Generator`; with them the weights are rounded to bfloat16.
            cache_dtype: see `Generator`.

        Raises:
            UserError: there is no such checkpoint, it is damaged, or device, attention or `cache_dtype`
                cannot be used.
        """
        place = pick_device(str(device))
        graphs = uses_graphs(graphs, place)
        pick_cache_dtype(cache_dtype, graphs, place)  # before the model is loaded
        model, max_context = load_model(Path(folder), place)
        if graphs:
            model = model.to(torch.bfloat16)
        return cls(model, max_context, attention, graphs, cache_dtype)

    def generate(
        self,
        constraints: Constraints = UNCONSTRAINED,
        prompt: Prompt | None = None,
        num: int = 1,
        seed: int = 0,
        *,
        bars: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> list[Song]:
        """Write `num` songs side by side; each ends by itself.

        Args:
            constraints: what the new bars keep to. Instruments that the prompt lacks are added to its band.
            prompt: what to continue, note for note: token ids [n], a MIDI file or its path. None begins new
                songs.
            num: how many songs, at least 1.
            seed: of the first song; the next has `seed + 1`, and so on. Alone or beside others, a song of one
                seed is the same, unless rounding tips a draw.
            bars: number of new bars in each; None lets the model decide.
            max_tokens: maximum number of new tokens in each; it cuts a song after its last complete note.
            sampling: how tokens are drawn.

        Raises:
            ValueError: num or bars is below 1, or the prompt breaks the grammar.
            MidiError: the prompt is a MIDI file that cannot become a song.
        """
        drafts = self._drafts(constraints, prompt, num, seed, bars, max_tokens, sampling)
        for _ in self._write(drafts):
            pass
        return [Song(draft.song(), seed + number) for number, draft in enumerate(drafts)]

    def stream(
        self,
        constraints: Constraints = UNCONSTRAINED,
        prompt: Prompt | None = None,
        num: int = 1,
        seed: int = 0,
        *,
        bars: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> Iterator[Bar]:
        """The new bars of the songs of `generate`, each as soon as it is complete.

        Arguments and errors are those of `generate`; errors are raised at once, not with the first bar.
        Closing the iterator, or leaving it to the garbage collector, ends the work: at the next token.
        """
        drafts = self._drafts(constraints, prompt, num, seed, bars, max_tokens, sampling)
        return self._bars(drafts)

    def _write(self, drafts: list[Draft]) -> Iterator[int]:
        if self._graphs:
            reason = cannot_write(drafts, self._cache_dtype)
            if reason is None:
                settings = self.max_context, self._attention, self._kept, self._cache_dtype
                return write_on_device(self.model, drafts, *settings)
            self._kept.release()  # for the caches of the other loop
            warnings.warn(f"songs are written {reason}", stacklevel=3)
        return write(self.model, drafts, self.max_context, self._attention)

    def _bars(self, drafts: list[Draft]) -> Iterator[Bar]:
        begins, counts = [draft.begin for draft in drafts], [0] * len(drafts)
        open_drafts = dict(enumerate(drafts))

        def completed(number: int, end: int) -> Iterator[Bar]:
            """The bar between the last one and `end`, if there is one."""
            ids = np.array(drafts[number].ids[:end], dtype=np.uint16)
            chords = np.flatnonzero(
                vocab.CHORD.mask(ids[begins[number] :])
            )  # a new song lists its band first
            if len(chords):
                so_far = np.append(ids, np.uint16(vocab.EOS))
                yield Bar(number, counts[number], ids[begins[number] + chords[0] :], so_far)
                begins[number], counts[number] = end, counts[number] + 1

        def ended() -> Iterator[Bar]:
            for number in [number for number, draft in open_drafts.items() if draft.finished]:
                yield from completed(number, open_drafts.pop(number).complete)

        with closing(self._write(drafts)) as turns:
            for number in turns:
                if drafts[number].bar_line > begins[number] and number in open_drafts:
                    yield from completed(number, drafts[number].bar_line)
                yield from ended()
            yield from ended()

    def _drafts(
        self,
        constraints: Constraints,
        prompt: Prompt | None,
        num: int,
        seed: int,
        bars: int | None,
        max_tokens: int,
        sampling: Sampling,
    ) -> list[Draft]:
        if num < 1:
            raise ValueError(f"num must be positive, got {num}")
        ids = prompt if prompt is None or isinstance(prompt, np.ndarray) else HIDTokenizer().encode(prompt)
        if ids is not None and constraints.instruments is not None:
            ids = attributes.with_instruments(ids, constraints.instruments)
        more = {"bars": bars, "max_tokens": max_tokens, "sampling": sampling, "constraints": constraints}
        return [Draft(ids, seed=seed + number, **more) for number in range(num)]
