"""Songs as JSON: their tokens, and their bars as soon as they are complete, for a player or a page."""

import json
import sys

import numpy as np

from ..files import write_json
from ..midi.general_midi import instrument_name
from ..streams import Outlived
from ..tokens import attributes, vocab
from ..tokens.tokenizer import decode_score


def write_tokens(ids: np.ndarray, path: str) -> None:
    """Write `ids` and the names of the tokens, with the version of the vocabulary.

    Raises:
        OSError: the file cannot be written.
    """
    names = vocab.names()
    value = {
        "format_version": vocab.FORMAT_VERSION,
        "ids": ids.tolist(),
        "tokens": [names[token] for token in ids.tolist()],
    }
    write_json(path, value)


class BarStream:
    """Writes the new bars of one song to standard output, a line of JSON each.

    A line has `song` and `bar`, counted from 1; `at` and `seconds`, when it begins in the song and how long
    it is; `time_signature`, `tempo` in quarter notes per minute, `chords` (one label for each part of the
    bar); and `notes`, with `instrument`, `program` (null for drums), `pitch`, `velocity`, and `start` in the
    bar and `length` in quarter notes.

    Args:
        song: its number.
        begin: how many tokens are no new ones.
    """

    def __init__(self, song: int, begin: int):
        self._song, self._read, self._open = song, begin, True

    def write(self, ids: list[int], until: int) -> None:
        """Write the bars of ids[:until], which ends with a complete one, that were not written yet."""
        if until <= self._read:
            return
        whole = np.array(ids[:until])
        bars = attributes.scan_bars(whole)
        seconds = bars.seconds
        points = np.flatnonzero(bars.part == 0)
        for number, (first, after) in enumerate(zip(points, [*points[1:], len(bars.part)]), 1):
            point = int(bars.token[first])
            if point >= self._read:
                end = int(bars.token[after]) if after < len(bars.part) else until
                at, takes = seconds[:first].sum(), seconds[first:after].sum()
                when = {"bar": number, "at": round(float(at), 6), "seconds": round(float(takes), 6)}
                line = {"song": self._song, **when, **_bar(whole, point, end)}
                self._put(json.dumps(line))
        self._read = until

    def _put(self, line: str) -> None:
        out = sys.stdout.stream if isinstance(sys.stdout, Outlived) else sys.stdout
        try:
            if self._open:
                out.write(line + "\n")
                out.flush()
        except OSError as error:  # the reader has gone, or the disk under it is full
            self._open = False
            reason = error.strerror or error
            print(f"bars cannot be streamed ({reason}): the song is written all the same", file=sys.stderr)


def _bar(ids: np.ndarray, point: int, end: int) -> dict:
    header, skip = attributes.restated(ids, point)
    score, chords = decode_score(np.concatenate((header, ids[point + skip : end])))
    n, d = vocab.SIGNATURES[score.signature[0]]
    columns = (score.inst, score.start, score.length, score.pitch, vocab.bin_to_velocity(score.velocity))
    return {
        "time_signature": f"{n}/{d}",
        "tempo": int(score.bpm[0]),
        "chords": [vocab.CHORD.labels[label] for label in chords],
        "notes": [
            {
                "instrument": instrument_name(inst),
                "program": None if inst == vocab.DRUMS else inst,
                "start": start / vocab.STEPS_PER_QUARTER,
                "length": length / vocab.STEPS_PER_QUARTER,
                "pitch": pitch,
                "velocity": velocity,
            }
            for inst, start, length, pitch, velocity in zip(*(column.tolist() for column in columns))
        ],
    }
