"""The generation loop: token by token, new songs or the continuations of songs, one or several at once."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from ..model.transformer import MeloFormer
from ..tokens import attributes
from .decoder import Decoder
from .draft import Draft

MAX_CONTEXT = 24576


def context(ids: np.ndarray, limit: int) -> np.ndarray | None:
    """The longest end of a song that begins at a bar line and has at most `limit` tokens.

    It restates the band list, time signature and tempo, as the samples of training do. None if the last bar
    alone is too long.
    """
    if len(ids) <= limit:
        return ids
    points = attributes.cut_points(ids)
    for point in points[np.searchsorted(points, len(ids) - limit) :]:
        header, skip = attributes.restated(ids, int(point))
        kept = np.concatenate((header, ids[point + skip :]))
        if len(kept) <= limit:
            return kept
    return None


class Window:
    """The end of each song as the model sees it: at most so many tokens, from a bar line on.

    A song that outgrows its window goes on with the last three quarters of it, read anew in one pass: so that
    passes are rare, and what is seen stays long.

    Args:
        songs: how many songs there are.
        max_context: maximum number of tokens that the model sees at once.
        attention: name of a backend, or "auto".
        int8: see `Decoder`.
    """

    def __init__(
        self, model: MeloFormer, songs: int, max_context: int, attention: str = "auto", int8: bool = False
    ):
        self._decoder = Decoder(model, songs, attention, int8)
        self._limit = max_context
        self._read, self._seen = [0] * songs, [0] * songs  # tokens of the song, and of its window

    def logits(self, numbers: Sequence[int], songs: Sequence[Sequence[int]]) -> list[Tensor | None]:
        """Read what the songs have grown by since the last call, at least a token each.

        Args:
            numbers: which songs these are, below `songs`.
            songs: their token ids from the first one on.

        Returns:
            For each, logits [VOCAB_SIZE] of its next token, float32 on CPU; None if its last bar alone has
            more tokens than may be seen.
        """
        found: dict[int, Tensor | None] = {}
        anew: dict[bytes, list[int]] = {}  # by the tokens of the window: songs may share a prompt
        waiting: dict[int, Sequence[int]] = {}
        for number, ids in zip(numbers, songs):
            new = len(ids) - self._read[number]
            if self._read[number] and self._seen[number] + new <= self._limit:
                waiting[number] = ids[-new:]
                self._seen[number] += new
            else:
                window = self._begin(np.array(ids, dtype=np.int64), again=self._read[number] > 0)
                found[number] = None
                if window is not None:
                    anew.setdefault(window.tobytes(), []).append(number)
                    self._seen[number] = len(window)
            self._read[number] = len(ids)
        for window, together in anew.items():
            logits = self._decoder.prefill(together, np.frombuffer(window, dtype=np.int64)).float().cpu()
            found |= dict.fromkeys(together, logits)
        turn = [number for number, new in waiting.items() if len(new) == 1]  # most of them
        if turn:
            logits = self._decoder.step(turn, [waiting[number][0] for number in turn])
            found |= zip(turn, logits.float().cpu())
        for number, new in waiting.items():
            if len(new) > 1:
                found[number] = self._decoder.extend(number, new).float().cpu()
        return [found[number] for number in numbers]

    def _begin(self, ids: np.ndarray, again: bool) -> np.ndarray | None:
        shorter = context(ids, self._limit * 3 // 4) if again else None
        return context(ids, self._limit) if shorter is None else shorter


def write(
    model: MeloFormer, drafts: Sequence[Draft], max_context: int, attention: str, int8: bool = False
) -> Iterator[int]:
    """Write songs to their ends, side by side.

    Args:
        max_context: maximum number of tokens that the model sees at once; older bars are left out. A song of
            which a single bar is longer is cut after its last complete note.
        attention: name of the backend for passes over whole prompts, or "auto".
        int8: see `Decoder`.

    Yields:
        After every new token the number of the draft that it was appended to. A draft that is ended meanwhile
        costs nothing more.
    """
    window = Window(model, len(drafts), max_context, attention, int8)
    while True:
        for number, draft in enumerate(drafts):
            while draft.append_required():
                yield number
        active = [number for number, draft in enumerate(drafts) if not draft.finished]
        if not active:
            return
        for number, logits in zip(active, window.logits(active, [drafts[number].ids for number in active])):
            draft = drafts[number]
            if logits is None:
                draft.end()
            elif not draft.finished and draft.draw(logits):
                yield number
