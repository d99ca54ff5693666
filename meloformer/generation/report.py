"""What `generate` tells: a progress bar while it writes, and what it wrote, with hints, at the end."""

import sys
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..midi.general_midi import instrument_name
from ..stop import StopRequest
from ..streams import Outlived
from ..tokens import attributes, vocab
from .harmony import key_of
from .outline import Outline


@dataclass(frozen=True)
class NewMusic:
    """What the model added to a song.

    bars: number of new bars; the parts of a bar longer than 8 quarters count as one.
    notes: number of new notes.
    instruments: names of those that play them, in the order of the INST ids.
    seconds: playing time of the new bars.
    key: the major or minor key that fits the new notes best; None if they are too few to tell.
    """

    bars: int
    notes: int
    instruments: tuple[str, ...]
    seconds: float
    key: str | None = None

    @classmethod
    def of(cls, ids: np.ndarray, begin: int) -> "NewMusic":
        """The music of a song's token ids [n] from index `begin` on."""
        return cls.among(ids, np.arange(len(ids)) >= begin, attributes.scan_bars(ids).token >= begin)

    @classmethod
    def of_outline(cls, ids: np.ndarray, outline: Outline) -> "NewMusic":
        """What was written into an outline to become the song of these token ids."""
        is_open = np.array([bar.is_open for bar in outline.bars])
        scanned = attributes.scan(ids)
        return cls.among(ids, np.isin(scanned.inst, outline.written) & is_open[scanned.bar], is_open)

    @classmethod
    def among(cls, ids: np.ndarray, new: np.ndarray, new_bars: np.ndarray) -> "NewMusic":
        """The music of some tokens, bool [n], and bars, bool [bars], of a song."""
        melodic = new & (attributes.scan(ids).inst != vocab.DRUMS)
        key = key_of(_sounding(ids, np.flatnonzero(melodic & vocab.P.mask(ids))))
        bars, new = attributes.scan_bars(ids), ids[new]
        played = vocab.INSTRUMENTS[np.unique(new[vocab.INST.mask(new)]).astype(int) - vocab.INST.start]
        return cls(
            bars=int((new_bars & (bars.part == 0)).sum()),
            notes=int(vocab.P.mask(new).sum()),
            instruments=tuple(map(instrument_name, played.tolist())),
            seconds=float(bars.seconds[new_bars].sum()),
            key=key,
        )

    def __str__(self) -> str:
        counts = [_count(self.bars, "new bar"), _count(self.notes, "new note")]
        *others, last = self.instruments or ("",)
        if last:
            counts[1] += f" by {', '.join(others)} and {last}" if others else f" by {last}"
        if self.key:
            counts[1] += f" in {self.key}"
        return ", ".join([*counts, f"{self.seconds:.1f} seconds of music"])


def _sounding(ids: np.ndarray, notes: np.ndarray) -> np.ndarray:
    """How long each pitch class sounds, in steps [12], in the notes whose P tokens have these indices."""
    states_length = vocab.L.mask(np.append(ids, vocab.EOS))
    length = ids[attributes.last_index(states_length)[notes + states_length[notes + 1]]].astype(int)
    steps = vocab.LENGTHS[length - vocab.L.start]
    return np.bincount((ids[notes].astype(int) - vocab.P.start) % 12, steps, 12)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


class Progress:
    """The progress bar of a song, and why it ended; its methods are the callbacks of the generation loop.

    Args:
        bars: how many the user wants; None if the model decides.
        max_tokens: where the song ends at the latest.
        request: polled after every token.
        shared: a bar that shows several songs, from `progress_bar`; None makes one of this song.
    """

    def __init__(self, bars: int | None, max_tokens: int, request: StopRequest, shared: tqdm | None = None):
        self.wanted, self.max_tokens, self._request = bars, max_tokens, request
        self.tokens = 0
        self.stopped_by: str | None = None  # what requested the stop, if the loop saw the request
        self._bar = progress_bar(bars, max_tokens) if shared is None else shared
        self._owns_bar, self._shown = shared is None, 0

    def on_token(self, tokens: int, bars: int) -> None:
        self.tokens = tokens
        if self._owns_bar:
            self._bar.set_postfix(tokens=tokens, bars=bars, refresh=False)
        # The last bar that was begun is not complete yet.
        self._show(max(0, bars - 1) if self.wanted else tokens)

    def _show(self, done: int) -> None:
        self._bar.update(done - self._shown)
        self._shown = done

    def stop(self) -> bool:
        self.stopped_by = self._request.reason
        return self.stopped_by is not None

    @property
    def cut(self) -> bool:
        """Whether the maximum number of tokens ended the song, perhaps within a bar."""
        return self.stopped_by is None and self.tokens >= self.max_tokens

    def close(self, bars: int) -> None:
        """Show the number of bars of the finished song."""
        if self.wanted:
            self._show(bars - self.cut * (bars > 0))
        if self._owns_bar:
            self._bar.close()


def progress_bar(bars: int | None, max_tokens: int, songs: int = 1) -> tqdm:
    """A bar for so many songs of so many bars, or else at most so many tokens each."""
    unit = "bar" if bars else "token"
    return tqdm(total=songs * (bars or max_tokens), unit=unit, file=Outlived(sys.stderr))


def hints(music: NewMusic, progress: Progress, max_context: int) -> list[str]:
    """What the user may want to do about the end of a song, a line each; none where all went as asked.

    Args:
        max_context: the longest bar, in tokens, that the loop can go on with.
    """
    wanted, found = progress.wanted, []
    bars = f"{music.bars:,} of the {wanted:,} bars" if wanted else _count(music.bars, "bar")
    if progress.stopped_by:
        found.append(f"stopped by {progress.stopped_by}: kept {bars}, all that were complete")
    elif progress.cut:
        found.append(
            f"--max_tokens {progress.max_tokens} ended it in bar {music.bars:,}"
            f"{f' of {wanted:,}' if wanted else ''}, which may be cut short: raise --max_tokens"
        )
    elif wanted and music.bars < wanted:
        found.append(
            f"it ends after {bars}, because one bar alone grew longer than the {max_context:,} tokens of the "
            "rows that the model was trained on: try another --seed"
        )
    if not music.notes and not progress.cut:
        found.append("the new bars are rests: try another --seed, a higher --temperature or --instruments")
    return found


def hints_of_given(music: NewMusic, progress: Progress) -> list[str]:
    """The same for what was written into a given song."""
    if progress.stopped_by:
        return [f"stopped by {progress.stopped_by}: from there on the given song goes on alone"]
    if progress.cut:
        return [f"--max_tokens {progress.max_tokens} ended what is new: from there on the song goes on alone"]
    if not music.notes:
        return ["nothing was written: try another --seed, a higher --temperature, or --density"]
    return []
