"""`python -m benchmarks.fidelity FOLDER`: how well songs survive encoding and decoding.

The functions that read a song here share no code with the tokenizer.
"""

import time
from collections import Counter, defaultdict

import miditoolkit
import numpy as np
from tqdm import tqdm

from benchmarks.common import folder_report
from benchmarks.common.machine import describe, provenance
from meloformer import cli
from meloformer.data.inputs import find_files
from meloformer.errors import MidiError, UserError
from meloformer.midi.reader import read_midi
from meloformer.tokens.tokenizer import HIDTokenizer


def notes_by_key(midi: miditoolkit.MidiFile) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """(onset, offset) in quarters of every note, by (instrument, pitch)."""
    notes = defaultdict(list)
    for track in midi.instruments:
        for note in track.notes:
            key = (128 if track.is_drum else track.program, note.pitch)
            notes[key].append((note.start / midi.ticks_per_beat, note.end / midi.ticks_per_beat))
    return {key: sorted(value) for key, value in notes.items()}


def as_one_player(notes: dict) -> dict:
    """The notes that remain if all tracks of one program are played by one player.

    Of notes of one pitch that begin on the same step (1/24 quarter) the longest remains; a note that still
    sounds when its pitch is struck again ends there.
    """
    result = {}
    for key, struck in notes.items():
        by_step: dict[int, tuple[float, float]] = {}
        for onset, offset in struck:
            step = int(onset * 24 + 0.5)
            if step not in by_step or offset - onset > by_step[step][1] - by_step[step][0]:
                by_step[step] = (onset, offset)
        kept = [by_step[step] for step in sorted(by_step)]
        following = [onset for onset, _ in kept[1:]] + [float("inf")]
        result[key] = [(on, min(off, after)) for (on, off), after in zip(kept, following)]
    return result


def f1(expected: dict, found: dict, same) -> float:
    """F1 of notes matched one to one in time order within each key."""
    matched = 0
    for key, notes in expected.items():
        candidates = list(found.get(key, []))
        for note in notes:
            for i, candidate in enumerate(candidates):
                if same(note, candidate):
                    matched += 1
                    del candidates[i]
                    break
                if candidate[0] > note[0] + 1:
                    break
    total = sum(map(len, expected.values())) + sum(map(len, found.values()))
    return 2 * matched / total


def onset_f1(expected: dict, found: dict) -> float:
    """F1 with onsets within 1/48 quarter."""
    return f1(expected, found, lambda a, b: abs(a[0] - b[0]) <= 1 / 48 + 1e-9)


def offset_f1(expected: dict, found: dict) -> float:
    """F1 with onsets within 1/8 quarter and offsets within 1/8 quarter or 3 % of the length."""
    return f1(
        expected,
        found,
        lambda a, b: (
            abs(a[0] - b[0]) <= 1 / 8 and abs(a[1] - b[1]) <= max(1 / 8, 0.03 * (a[1] - a[0])) + 1e-9
        ),
    )


def bar_lines(midi: miditoolkit.MidiFile, end: float) -> list[tuple[float, int, int]]:
    """(position in quarters, numerator, denominator) of every bar that begins before `end` quarters."""
    tpq = midi.ticks_per_beat
    changes = {0: (4, 4)}
    for ts in midi.time_signature_changes:
        changes[ts.time] = (ts.numerator, ts.denominator)
    lines = []
    times = sorted(changes)
    for tick, following in zip(times, [*times[1:], float("inf")]):
        n, d = changes[tick]
        at, bar = tick / tpq, 0
        while at < min(following / tpq, end) - 1e-9:
            lines.append((at, n, d))
            bar += 1
            at = tick / tpq + bar * 4 * n / d
    return lines


def seconds_at(midi: miditoolkit.MidiFile, quarters: float) -> float:
    """Playing time in seconds up to a position in quarters."""
    changes = {0: 120.0}
    for change in midi.tempo_changes:
        changes[change.time] = change.tempo
    seconds, times = 0.0, sorted(changes)
    for tick, following in zip(times, [*times[1:], float("inf")]):
        low, high = tick / midi.ticks_per_beat, min(following / midi.ticks_per_beat, quarters)
        if high > low:
            seconds += (high - low) * 60.0 / changes[tick]
    return seconds


def bar_tempi(midi: miditoolkit.MidiFile, lines: list[tuple[float, int, int]]) -> np.ndarray:
    """Mean tempo of each bar in quarters per minute, from its duration."""
    quarters = np.array([4 * n / d for _, n, d in lines])
    lasted = [seconds_at(midi, at + 4 * n / d) - seconds_at(midi, at) for at, n, d in lines]
    return 60 * quarters / np.array(lasted)


def measure(midi: miditoolkit.MidiFile) -> dict[str, float]:
    """Fidelity of one song."""
    tokenizer = HIDTokenizer()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        ids = tokenizer.encode(midi)
        seconds.append(time.perf_counter() - started)
    decoded = tokenizer.decode(ids)
    raw, found = notes_by_key(midi), notes_by_key(decoded)
    player = as_one_player(raw)
    end = max(offset for notes in found.values() for _, offset in notes)
    lines, again = bar_lines(midi, end), bar_lines(decoded, end)
    same_bars = len(lines) == len(again) and all(
        a[1:] == b[1:] and abs(a[0] - b[0]) <= 0.5 / 24 + 1e-9 for a, b in zip(lines, again)
    )
    tempo_error = np.abs(bar_tempi(midi, again) - bar_tempi(decoded, again)).max()
    return {
        "tokens": len(ids),
        "onset_f1": onset_f1(player, found),
        "offset_f1": offset_f1(player, found),
        "raw_onset_f1": onset_f1(raw, found),
        "raw_offset_f1": offset_f1(raw, found),
        "same_bar_lines_and_signatures": float(same_bars),
        "max_tempo_error_bpm": float(tempo_error),
        "end_drift_s": abs(seconds_at(midi, end) - seconds_at(decoded, end)),
        "idempotent": float(np.array_equal(tokenizer.encode(decoded), ids)),
        "encode_s_per_20k_tokens": min(seconds) * 20_000 / len(ids),
    }


# What each figure of a song is, as on the page.
MEANINGS = {
    "tokens": "tokens per song",
    "onset_f1": "note F1, onset within 1/48 quarter",
    "offset_f1": "note F1, onset and offset within 1/8 quarter (offset or 3 % of the length)",
    "raw_onset_f1": "the first, doubled and overlapping notes of a program counted as lost",
    "raw_offset_f1": "the second, likewise",
    "same_bar_lines_and_signatures": "bar lines and time signatures equal (1: all of them)",
    "max_tempo_error_bpm": "largest error of a bar's tempo, BPM",
    "end_drift_s": "difference in duration of the song, seconds",
    "idempotent": "encoding the decoded song gives the same tokens (1: yes)",
    "encode_s_per_20k_tokens": "seconds to encode 20,000 tokens, parsing not counted",
}


def page(result: dict) -> str:
    """The figures as a Markdown page."""
    refused = ", ".join(f"{reason} {count}" for reason, count in result["refused"].items()) or "none"
    rows = "".join(
        f"| {MEANINGS[key]} | {low:.4g} | {median:.4g} | {high:.4g} |\n"
        for key, (low, median, high) in result["min_median_max"].items()
    )
    return (
        f"# What encoding and decoding keep of {result['songs']} songs\n\n"
        f"Files refused: {refused}. A program's tracks are compared as one player would play them, see "
        "docs/tokens.md.\n\n| figure, per song | min | median | max |\n|---|---|---|---|\n"
        f"{rows}\nMade by `python -m benchmarks.fidelity FOLDER --json FILE` on "
        f"{provenance(result['machine'])}.\n"
    )


def main(argv: list[str] | None = None) -> None:
    args = folder_report.parse("python -m benchmarks.fidelity", __doc__.splitlines()[0], argv)
    songs, refused = [], Counter()
    for path in tqdm(find_files(args.folder), unit="file"):
        try:
            songs.append(measure(read_midi(path)))
        except MidiError as error:
            refused[error.reason] += 1
    if not songs:
        raise UserError(f"{args.folder}: no file could be read")
    summary = {}
    for key in MEANINGS:
        values = np.array([song[key] for song in songs])
        summary[key] = [float(values.min()), float(np.median(values)), float(values.max())]
    result = {"machine": describe(), "songs": len(songs), "refused": refused, "min_median_max": summary}
    folder_report.publish(result, page(result), args.json)


if __name__ == "__main__":
    cli.run(main)
