"""What `generate` tells: a progress bar while it writes, and what it wrote, with hints, at the end."""

import contextlib
import sys
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..midi.general_midi import PROGRAM_NAMES
from ..stop import StopRequest
from ..tokens import attributes, vocab


@dataclass(frozen=True)
class NewMusic:
    """What the model added to a song.

    bars: number of new bars; the parts of a bar longer than 8 quarters count as one.
    notes: number of new notes.
    instruments: names of those that play them, in the order of the INST ids.
    seconds: playing time of the new bars.
    """

    bars: int
    notes: int
    instruments: tuple[str, ...]
    seconds: float

    @classmethod
    def of(cls, ids: np.ndarray, begin: int) -> "NewMusic":
        """The music of a song's token ids [n] from index `begin` on."""
        bars, new = attributes.scan_bars(ids), ids[begin:]
        is_new = bars.token >= begin
        quarters = bars.steps[is_new] / vocab.STEPS_PER_QUARTER
        played = vocab.INSTRUMENTS[np.unique(new[vocab.INST.mask(new)]).astype(int) - vocab.INST.start]
        return cls(
            bars=int((is_new & (bars.part == 0)).sum()),
            notes=int(vocab.P.mask(new).sum()),
            instruments=tuple("Drums" if i == vocab.DRUMS else PROGRAM_NAMES[i] for i in played.tolist()),
            seconds=float((quarters * 60 / bars.bpm[is_new]).sum()),
        )

    def __str__(self) -> str:
        counts = [_count(self.bars, "new bar"), _count(self.notes, "new note")]
        *others, last = self.instruments or ("",)
        if last:
            counts[1] += f" by {', '.join(others)} and {last}" if others else f" by {last}"
        return ", ".join([*counts, f"{self.seconds:.1f} seconds of music"])


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


class Progress:
    """The progress bar of a song, and why it ended; its methods are the callbacks of the generation loop.

    Args:
        bars: how many the user wants; None if the model decides.
        max_tokens: where the song ends at the latest.
        request: polled after every token.
    """

    def __init__(self, bars: int | None, max_tokens: int, request: StopRequest):
        self.wanted, self.max_tokens, self._request = bars, max_tokens, request
        self.tokens = 0
        self.stopped_by: str | None = None  # what requested the stop, if the loop saw the request
        self._bar = tqdm(total=bars or max_tokens, unit="bar" if bars else "token", file=_Stderr())

    def on_token(self, tokens: int, bars: int) -> None:
        self.tokens = tokens
        self._bar.set_postfix(tokens=tokens, bars=bars, refresh=False)
        # The last bar that was begun is not complete yet.
        self._bar.update((max(0, bars - 1) if self.wanted else tokens) - self._bar.n)

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
            self._bar.update(bars - self.cut * (bars > 0) - self._bar.n)
        self._bar.close()


class _Stderr:
    """stderr, for the bar: a song goes on even where that cannot be written, for instance to a full disk."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str):
        return getattr(sys.stderr, name)


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
