"""The song of `generate --given`: what of it stays, and who is to play what is written."""

import argparse
import re
from typing import NamedTuple

import miditoolkit

from ..errors import MidiError, UserError
from ..midi.reader import read_midi
from ..tokens import attributes
from ..tokens.score import instrument_of
from ..tokens.tokenizer import HIDTokenizer
from .arguments import instrument_name, parse_instruments
from .constraints import Constraints
from .melody import melody_of
from .outline import Outline


class Given(NamedTuple):
    """A song as its file has it, without the instruments that are not kept, and what of it stays.

    melody: the instrument that was kept as the melody; None if none was asked for.
    """

    song: miditoolkit.MidiFile
    outline: Outline
    melody: int | None


def add_given(parser: argparse.ArgumentParser) -> None:
    """The flags that `read_given` reads."""
    add = parser.add_argument_group("to accompany a song, or write parts of it anew").add_argument
    add(
        "--given",
        help="a MIDI file to accompany, or to write parts of anew; all else in it stays note for note",
        metavar="FILE",
    )
    add(
        "--add",
        help="instruments that play along with it, named as for --instruments, e.g. 'bass, strings'; one "
        "that plays in the file already gets a new part",
        metavar="INSTRUMENTS",
    )
    add(
        "--keep",
        help="leave out all instruments of the file but these, e.g. 'melody, drums', where melody is the one "
        "that plays the melody; without this flag all stay",
        metavar="INSTRUMENTS",
    )
    add(
        "--replace_bars",
        help="write in these bars only, e.g. 9-16, counted from 1: there the parts of --instruments, or of "
        "the whole band, are written anew, or with --add those of the added instruments",
        metavar="A-B",
    )


def read_given(args: argparse.Namespace, constraints: Constraints) -> Given:
    """What the flags of `add_given` ask for.

    Raises:
        UserError: flags contradict each other, or the file cannot become a song.
    """
    for flag in ("prompt", "bars", "tempo", "time_signature"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} does not go with --given, whose song has its own")
    if args.add is None and args.replace_bars is None:
        raise UserError("--given needs --add, --replace_bars or both")
    try:
        song = read_midi(args.given)
        band = set(attributes.band(HIDTokenizer().encode(song)).tolist())
    except MidiError as error:
        raise UserError(f"--given {args.given}: {error}") from None
    melody = None
    if args.keep is not None:
        kept, melody = _kept(args.keep, song, band, args.given)
        song.instruments = [track for track in song.instruments if instrument_of(track) in kept]
        band = kept
    if args.add is not None:
        written = parse_instruments(args.add, "--add")
    elif args.instruments is not None:
        written = _of_the_song("--instruments", args.instruments, band, args.given)
    else:
        written = tuple(band)
    bars = None if args.replace_bars is None else _parse_bars(args.replace_bars)
    try:
        return Given(song, Outline.of(song, written, bars, constraints.chords), melody)
    except ValueError as error:
        raise UserError(f"--given {args.given}: {error}") from None


def _kept(text: str, song: miditoolkit.MidiFile, band: set[int], path: str) -> tuple[set[int], int | None]:
    """The instruments that --keep names, and which of them is the melody, if it is named so."""
    words = [word.strip().lower() for word in text.split(",")]
    named = [word for word in words if word != "melody"]
    kept = set(_of_the_song("--keep", ",".join(named), band, path)) if named else set()
    melody = None
    if "melody" in words:
        melody = melody_of(song)
        if melody is None:
            raise UserError(
                f"--keep: no instrument of {path} is a melody by itself, of single notes, above the bass and "
                f"often by step: name the ones to keep, of {_names(band)}"
            )
        kept.add(melody)
    return kept, melody


def _of_the_song(flag: str, text: str, band: set[int], path: str) -> tuple[int, ...]:
    named = parse_instruments(text, flag)
    for instrument in named:
        if instrument not in band:
            raise UserError(
                f"{flag}: {instrument_name(instrument)} does not play in {path}, but {_names(band)}"
            )
    return named


def _names(band: set[int]) -> str:
    return ", ".join(instrument_name(instrument) for instrument in sorted(band))


def _parse_bars(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if match is None:
        raise UserError(f"--replace_bars: '{text}' is no range of bars such as 9-16")
    return int(match[1]), int(match[2] or match[1])
