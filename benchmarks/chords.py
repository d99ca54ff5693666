"""`python -m benchmarks.chords`: how right and how predictable CHORD labels are.

The annotations are as in POP909: `NAME/chord_midi.txt` for the song `NAME.mid`, a chord a line as
`start end root:quality[/bass]` in seconds, or N. A bar counts if it lies within one chord other than N.
"""

import argparse
import copy
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import miditoolkit
import numpy as np
from tqdm import tqdm

from benchmarks.common import folder_report, markdown
from benchmarks.common.machine import describe, provenance
from benchmarks.learning.toy import BARS_AGO, FIXED_CHORD
from meloformer import cli
from meloformer.data.inputs import find_files
from meloformer.errors import MidiError, UserError
from meloformer.midi.reader import read_midi
from meloformer.tokens import score, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

ANNOTATION = "chord_midi.txt"
BEATS = 4  # of a bar as annotated
LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
ACCIDENTALS = {"": 0, "#": 1, "b": -1}
# The triad of each quality of the annotations and of `vocab.QUALITIES`. Suspended chords and bare fifths are
# triads of their own: neither is taken for major or minor.
TRIADS = {
    "maj": ("maj", "maj6", "6", "7", "maj7", "9", "maj9"),
    "min": ("min", "min6", "min7", "minmaj7", "min9"),
    "dim": ("dim", "hdim7", "dim7"),
    "aug": ("aug",),
    "sus2": ("sus2",),
    "sus4": ("sus4", "sus4(b7)"),
    "5": ("5",),
}
TRIAD_OF = {quality: triad for triad, qualities in TRIADS.items() for quality in qualities}
# The parts of the mixture of a toy that copies and counts. Of bars before the song, all songs take the part.
ALL_SONGS, THIS_SONG, *OF_BARS_AGO = FIXED_CHORD.tolist()


@dataclass
class Tally:
    """Bars counted, those with the right root, those with root and triad, and what was found in the others.

    roots: semitones above the right root, or N for the label N. triads: "right > found".
    """

    bars: int = 0
    root: int = 0
    triad: int = 0
    roots: Counter = field(default_factory=Counter)
    triads: Counter = field(default_factory=Counter)

    def add(self, right: tuple[int, str], found: tuple[int, str] | None) -> None:
        """One bar; `found` is None for the label N."""
        self.bars += 1
        if found is None or found[0] != right[0]:
            self.roots["N" if found is None else str((found[0] - right[0]) % 12)] += 1
        elif found[1] != right[1]:
            self.root += 1
            self.triads[f"{right[1]} > {found[1]}"] += 1
        else:
            self.root += 1
            self.triad += 1

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def parse_chord(text: str) -> tuple[int, str] | None:
    """Root (0 is C) and triad of `root:quality[/bass]`; None for N. Raises ValueError for anything else."""
    if text == "N":
        return None
    root, colon, quality = text.partition("/")[0].partition(":")
    if not colon or root[:1] not in LETTERS or root[1:] not in ACCIDENTALS or quality not in TRIAD_OF:
        raise ValueError(f"'{text}' is no chord")
    return (LETTERS[root[0]] + ACCIDENTALS[root[1:]]) % 12, TRIAD_OF[quality]


def read_annotation(path: Path) -> list[tuple[float, float, str]]:
    """(start, end, chord without its bass) of each chord, seconds. Equal neighbours are one chord.

    Raises UserError if the file cannot be read or holds something else.
    """
    chords: list[tuple[float, float, str]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            start, end, name = line.split()
            span = float(start), float(end), name.partition("/")[0]
            parse_chord(name)
        except ValueError:
            raise UserError(f"{path}, line {number}: is not 'start end chord'") from None
        if chords and chords[-1][2] == span[2] and abs(chords[-1][1] - span[0]) < 1e-3:
            span = (chords.pop()[0], *span[1:])
        chords.append(span)
    return chords


def quarters_at(midi: miditoolkit.MidiFile, seconds: np.ndarray) -> np.ndarray:
    """Positions in quarters of times in seconds, float [n]."""
    tempi = {0: 120.0} | {change.time: change.tempo for change in midi.tempo_changes}
    ticks = np.array(sorted(tempi))
    rate = np.array([tempi[tick] for tick in ticks]) / 60  # quarters per second
    at = ticks / midi.ticks_per_beat
    began = np.concatenate(([0.0], np.cumsum(np.diff(at) / rate[:-1])))
    last = np.maximum(np.searchsorted(began, seconds, side="right") - 1, 0)
    return at[last] + (seconds - began[last]) * rate[last]


def bar_as_annotated(
    midi: miditoolkit.MidiFile, edges: np.ndarray
) -> tuple[miditoolkit.MidiFile, np.ndarray]:
    """The song in 4/4 with bar lines where most chords of a bar or more begin.

    POP909's files have bars of one or two quarters, or bar lines between the beats.

    Args:
        edges: where chords begin, and where the last ends, quarters, float [chords + 1].

    Returns: the song, moved later by less than a bar and a quarter, and `edges` moved likewise.
    """
    phase = float(np.angle(np.exp(2j * np.pi * edges[1:]).mean()) / (2 * np.pi)) % 1  # of the beats
    beats = np.round(edges - phase).astype(np.int64)
    long = np.diff(beats) >= BEATS
    begins = np.bincount(beats[:-1] % BEATS, weights=1 + len(beats) * long, minlength=BEATS)
    shift = BEATS - (phase + int(begins.argmax())) % BEATS
    moved, ticks = copy.deepcopy(midi), round(shift * midi.ticks_per_beat)
    for note in (note for track in moved.instruments for note in track.notes):
        note.start, note.end = note.start + ticks, note.end + ticks
    for change in moved.tempo_changes:
        change.time += ticks if change.time else 0
    moved.time_signature_changes = [miditoolkit.TimeSignature(BEATS, 4, 0)]
    return moved, edges + ticks / midi.ticks_per_beat


def chord_labels(midi: miditoolkit.MidiFile) -> np.ndarray:
    """Index of the CHORD label of each bar, int64 [bars], as `encode` writes it."""
    ids = HIDTokenizer().encode(midi)
    return ids[vocab.CHORD.mask(ids)].astype(np.int64) - vocab.CHORD.start


def compare(midi: miditoolkit.MidiFile, edges: np.ndarray, chords: list[str]) -> Tally:
    """Labels of a song against its chords, over the bars that lie within one chord.

    Args:
        edges: quarters, float [chords + 1], rounded to the step grid like the notes.
    """
    steps = np.floor(edges * vocab.STEPS_PER_QUARTER + 0.5)
    song = score.from_midi(midi)
    tally = Tally()
    for label, start, length in zip(chord_labels(midi), song.bar_start, song.bar_steps):
        at = int(np.searchsorted(steps, start, side="right")) - 1
        if not 0 <= at < len(chords) or start + length > steps[at + 1]:
            continue
        if right := parse_chord(chords[at]):
            tally.add(right, parse_chord(vocab.CHORD.labels[label]))
    return tally


def measure(midi: miditoolkit.MidiFile, chords: list[tuple[float, float, str]]) -> dict[str, Tally]:
    """One song, by the bars of its file and by bars as annotated."""
    edges = quarters_at(midi, np.array([chord[0] for chord in chords] + [chords[-1][1]]))
    names = [chord[2] for chord in chords]
    return {"file": compare(midi, edges, names), "annotated": compare(*bar_as_annotated(midi, edges), names)}


def toy_nats(counted: list[np.ndarray], predicted: list[np.ndarray]) -> float:
    """Nats per label of the toy on the songs `predicted`, with the labels of the songs `counted`.

    Each song is an int64 array of label indices [bars]. Every label is counted once more than it stands.
    """
    base = 1.0 + np.bincount(np.concatenate(counted), minlength=len(vocab.CHORD))
    base /= base.sum()
    nats, bars = 0.0, 0
    for labels in predicted:
        counts = np.zeros(len(vocab.CHORD))
        for bar, label in enumerate(labels):
            chance = ALL_SONGS * base[label] + THIS_SONG * (counts[label] / bar if bar else base[label])
            for ago, part in zip(BARS_AGO, OF_BARS_AGO):
                chance += part * (labels[bar - ago] == label if bar >= ago else base[label])
            nats -= np.log(chance)
            counts[label] += 1
        bars += len(labels)
    return nats / bars


def labels_of(source: str) -> list[np.ndarray]:
    """Labels of every song of a folder or list that can be read."""
    songs = []
    for path in tqdm(find_files(source), unit="file"):
        try:
            songs.append(chord_labels(read_midi(path)))
        except MidiError:
            continue
    if not songs:
        raise UserError(f"{source}: no file could be read")
    return songs


def total(tallies: dict[str, dict[str, Tally]], names: list[str]) -> dict[str, Tally]:
    """Sums over the songs of these names."""
    return {kind: sum((tallies[name][kind] for name in names), Tally()) for kind in ("file", "annotated")}


def figures(tallies: dict[str, Tally]) -> dict[str, dict[str, int]]:
    """Tallies as JSON values."""
    return {
        kind: {"bars": tally.bars, "root": tally.root, "root_and_triad": tally.triad}
        for kind, tally in tallies.items()
    }


def page(result: dict) -> str:
    """The figures as a Markdown page."""
    heads = ["songs"]
    for bars in ("the file's bars", "bars as annotated"):
        heads += [bars, "root", "root and triad"]

    def cells(name: str, entry: dict) -> list[str]:
        line = [name]
        for kind in ("file", "annotated"):
            bars = entry[kind]["bars"]
            rates = [100 * entry[kind][key] / bars if bars else None for key in ("root", "root_and_triad")]
            line += [str(bars), *(markdown.cell(rate, "{:.1f} %") for rate in rates)]
        return line

    lines = [cells(f"**{name}**", entry) for name, entry in result["totals"].items()]
    for name, entry in result["songs"].items():
        lines.append(cells(f"{name} (t)" if name in result["tuned_on"] else name, entry))
    text = (
        f"# How right CHORD labels are, {len(result['songs'])} annotated songs\n\n"
        "Bars within one annotated chord, and the share of them whose label is right. Songs on which costs "
        f"of `meloformer/tokens/chords.py` were chosen are marked (t).\n\n{markdown.table(heads, lines)}"
    )
    for kind, name in (("file", "the file's bars"), ("annotated", "bars as annotated")):
        errors = result["errors_of_kept_back"][kind]
        roots = ", ".join(f"{interval} {count}" for interval, count in errors["roots"].items()) or "none"
        triads = ", ".join(f"{pair} {count}" for pair, count in errors["triads"].items()) or "none"
        text += (
            f"\nErrors in {name} of the songs not marked. Roots, by semitones above the right one (N: label "
            f"N): {roots}. Triads where the root is right, annotated > found: {triads}.\n"
        )
    if toy := result["toy"]:
        text += (
            f"\nPredictability: a toy that copies and counts needs {toy['nats']:.2f} nats per label on "
            f"{toy['songs']} songs; labels of {toy['counted_songs']} others were counted.\n"
        )
    return f"{text}\nMade by `python -m benchmarks.chords` on {provenance(result['machine'])}.\n"


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.chords", description=__doc__.splitlines()[0])
    parser.add_argument("--songs", required=True, help="folder of MIDI files, or a list file")
    parser.add_argument(
        "--annotations", required=True, type=Path, help=f"folder of NAME/{ANNOTATION} for songs NAME.mid"
    )
    parser.add_argument(
        "--tuned_on",
        nargs="+",
        default=[],
        metavar="NAME",
        help="songs on which costs were chosen, to be told apart",
    )
    parser.add_argument(
        "--toy",
        nargs=2,
        metavar=("COUNT", "PREDICT"),
        help="folders or lists of songs: the toy counts labels in the first and predicts those of the second",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, and a page beside it")
    args: argparse.Namespace = parser.parse_args(argv)

    tallies: dict[str, dict[str, Tally]] = {}
    for path in tqdm(find_files(args.songs), unit="file"):
        annotation = args.annotations / Path(path).stem / ANNOTATION
        if annotation.is_file() and (chords := read_annotation(annotation)):
            tallies[Path(path).stem] = measure(read_midi(path), chords)
    if not tallies:
        raise UserError(f"{args.annotations}: holds no NAME/{ANNOTATION} for a song of {args.songs}")
    if unknown := set(args.tuned_on) - set(tallies):
        raise UserError(f"--tuned_on: {', '.join(sorted(unknown))} is not among the annotated songs")

    kept_back = [name for name in tallies if name not in args.tuned_on]
    groups = {"kept back": kept_back, "tuned on": args.tuned_on} if args.tuned_on else {}
    totals = {group: total(tallies, names) for group, names in (groups | {"all": list(tallies)}).items()}
    toy = None
    if args.toy:
        counted, predicted = map(labels_of, args.toy)
        nats = toy_nats(counted, predicted)
        toy = {"nats": nats, "songs": len(predicted), "counted_songs": len(counted)}
    result = {
        "machine": describe(),
        "tuned_on": sorted(args.tuned_on),
        "totals": {group: figures(kinds) for group, kinds in totals.items()},
        "songs": {name: figures(kinds) for name, kinds in tallies.items()},
        "errors_of_kept_back": {
            kind: {"roots": dict(tally.roots.most_common()), "triads": dict(tally.triads.most_common())}
            for kind, tally in total(tallies, kept_back).items()
        },
        "toy": toy,
    }
    folder_report.publish(result, page(result), args.json)


if __name__ == "__main__":
    cli.run(main)
