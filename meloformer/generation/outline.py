"""A song of which some bars or instruments are to be written anew, and the rest stays as it is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import miditoolkit
import numpy as np

from ..midi.general_midi import instrument_name
from ..tokens import attributes, vocab
from ..tokens.score import instrument_of, to_steps
from ..tokens.tokenizer import HIDTokenizer


@dataclass(frozen=True)
class OutlineBar:
    """A bar, or one of the parts of a long bar.

    tokens: its header, then the groups that stay.
    is_open: whether groups are to be written after them.
    """

    tokens: tuple[int, ...]
    is_open: bool


@dataclass(frozen=True)
class Outline:
    """What stays of a song, and who plays what is written.

    In every bar the groups that stay come first, so that they are heard before others are written.

    Attributes:
        header: BOS and the band list.
        bars: the bars of the song in turn.
        written: the instruments that are written, in the open bars alone.
        start, stop: the open bars' place in the song, in steps.
        whole_bars: how many bars there are; the parts of a long one count once.
    """

    header: tuple[int, ...]
    bars: tuple[OutlineBar, ...]
    written: tuple[int, ...]
    start: int
    stop: int
    whole_bars: int

    @classmethod
    def of(
        cls,
        song: miditoolkit.MidiFile,
        written: Collection[int],
        bars: tuple[int, int] | None = None,
        chords: Sequence[int] | None = None,
    ) -> "Outline":
        """The outline of `song` without what `written` instruments play in some bars.

        Args:
            song: as `midi.reader.read_midi` returns it.
            written: programs, `vocab.DRUMS`. Those that the song has not are added to its band.
            bars: the first and the last bar to write, counted from 1; None for all of them.
            chords: ids of CHORD tokens, one for each bar to write and again from the first, instead of those
                that are heard in the song.

        Raises:
            MidiError: the song cannot be encoded.
            ValueError: there are no such bars, or no instrument is to be written.
        """
        tokenizer = HIDTokenizer()
        written = tuple(sorted(written, key=lambda inst: vocab.INSTRUMENT_RANK[inst]))
        if not written:
            raise ValueError("no instrument is to be written")
        staying = [inst for inst in attributes.band(tokenizer.encode(song)) if inst not in written]
        ids = tokenizer.encode(song, band=[*staying, *written])
        scanned = attributes.scan_bars(ids)
        number = np.cumsum(scanned.part == 0)  # of each bar, counted from 1
        first, last = (1, int(number[-1])) if bars is None else bars
        if not 1 <= first <= last <= number[-1]:
            raise ValueError(f"there are no bars {first} to {last} in a song of {number[-1]}")
        is_open = (first <= number) & (number <= last)
        inst = attributes.scan(ids).inst
        outlines = []
        for index, begin in enumerate(scanned.token):
            end = scanned.token[index + 1] if index + 1 < len(scanned.token) else len(ids) - 1
            tokens = ids[begin:end]
            if is_open[index]:
                tokens = tokens[~np.isin(inst[begin:end], written)]
                if chords is not None:
                    tokens[0] = chords[(number[index] - first) % len(chords)]
            outlines.append(OutlineBar(tuple(tokens.tolist()), bool(is_open[index])))
        begins, ends = scanned.start[is_open], (scanned.start + scanned.steps)[is_open]
        header = tuple(ids[: scanned.token[0]].tolist())
        start, stop = int(begins[0]), int(ends[-1])
        return cls(header, tuple(outlines), written, start, stop, int(number[-1]))

    def put_into(self, song: miditoolkit.MidiFile, ids: np.ndarray) -> int:
        """Replace in `song`, of which this is the outline, what was to be written by what `ids` say.

        All else in it stays as it is, also what tokens would round.

        Args:
            ids: token ids of a whole song that keeps to this outline.

        Returns:
            How many notes were written.
        """
        decoded = HIDTokenizer().decode(ids)
        count = 0
        for inst in self.written:
            mine = [track for track in song.instruments if instrument_of(track) == inst]
            for track in mine:
                track.notes = [n for n in track.notes if not self._is_open(n.start, song.ticks_per_beat)]
            new = [
                miditoolkit.Note(note.velocity, note.pitch, *_rescaled(note, decoded, song))
                for track in decoded.instruments
                if instrument_of(track) == inst
                for note in track.notes
                if self._is_open(note.start, decoded.ticks_per_beat)
            ]
            if new and not mine:
                drums = inst == vocab.DRUMS
                mine = [miditoolkit.Instrument(0 if drums else inst, drums, instrument_name(inst))]
                song.instruments += mine
            if new:
                mine[0].notes = sorted([*mine[0].notes, *new], key=lambda note: (note.start, note.pitch))
                song.max_tick = max(song.max_tick, max(note.end for note in new) + 1)
            count += len(new)
        return count

    def _is_open(self, tick: int, ticks_per_beat: int) -> bool:
        return self.start <= to_steps(tick, ticks_per_beat) < self.stop


def _rescaled(note: miditoolkit.Note, of: miditoolkit.MidiFile, to: miditoolkit.MidiFile) -> tuple[int, int]:
    start, end = (round(at * to.ticks_per_beat / of.ticks_per_beat) for at in (note.start, note.end))
    return start, max(end, start + 1)
