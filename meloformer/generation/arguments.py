"""Flags of generate that say what the music shall be, and how they are read."""

import argparse
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import TypeVar

from .. import cli
from ..errors import UserError
from ..midi.general_midi import PROGRAM_NAMES
from ..tokens import vocab
from .constraints import Constraints
from .harmony import parse_chords, parse_key, pitch_class
from .sampling import DEFAULT_SAMPLING, KINDS, Sampling
from .steering import BARS_BACK

Value = TypeVar("Value")

# What people call an instrument without having one of the General MIDI programs in mind.
SHORT_NAMES = {
    "drums": vocab.DRUMS,
    "piano": 0,
    "electric piano": 4,
    "organ": 16,
    "guitar": 25,
    "electric guitar": 27,
    "bass": 33,
    "strings": 48,
    "choir": 52,
    "brass": 61,
    "sax": 65,
    "synth": 80,
    "pad": 89,
}
_NAMES = {name.lower(): program for program, name in enumerate(PROGRAM_NAMES)} | SHORT_NAMES


def add_wishes(parser: argparse.ArgumentParser) -> None:
    """The flags that `read_constraints` and `read_sampling` read."""
    music = parser.add_argument_group("what the new bars shall be").add_argument
    music(
        "--tempo",
        type=cli.integer(vocab.MIN_BPM, vocab.MAX_BPM),
        help=f"tempo in quarter notes per minute, {vocab.MIN_BPM}..{vocab.MAX_BPM}",
    )
    music("--time_signature", help="e.g. 3/4")
    music(
        "--instruments",
        help="the band, e.g. 'drums, bass, piano, 25': General MIDI programs by number or name, or "
        f"{', '.join(SHORT_NAMES)}; no others play",
    )
    music(
        "--chords", help="a chord for each bar, e.g. 'C G Am F', again from the first when they are used up"
    )
    music(
        "--key",
        help="e.g. 'A minor': other notes, and chords of other notes, are discouraged; drums have no key",
    )
    music("--strict_key", action="store_true", help="forbid them instead")
    music(
        "--register",
        help="the pitches of an instrument, e.g. 'bass E1-G3, piano 48-84'; C4 is 60, middle C",
        metavar="RANGES",
    )
    music(
        "--density",
        help="about how many notes an instrument plays in a bar in which it plays, e.g. 'drums 16, piano 4'",
        metavar="NUMBERS",
    )
    music(
        "--repetition_penalty",
        help=f"makes it less likely that an instrument plays one of its last {BARS_BACK} bars again: each "
        "note that would go on with the copy becomes e^P times less likely for each such bar; e.g. 1 for all "
        "but the drums, or 'piano 2, drums 0.5'",
        metavar="P",
    )
    draw = parser.add_argument_group("how tokens are drawn").add_argument
    draw(
        "--temperature",
        type=cli.number(0, 100),
        default=1.0,
        help="divides the logits: above 1 more varied, below 1 more predictable, 0 greedy",
    )
    for kind, families in KINDS.items():
        names = " and ".join(family.name for family in families)
        draw(
            f"--{kind}_temperature",
            type=cli.number(0, 100),
            default=DEFAULT_SAMPLING.kind_temperatures.get(kind),
            help=f"another temperature for the choice among {names} tokens",
            metavar="T",
        )
    draw("--top_k", type=cli.positive_int, help="sample from the K most likely tokens only", metavar="K")
    draw(
        "--top_p",
        type=cli.number(1e-6, 1),
        default=1.0,
        help="sample from the most likely tokens whose probabilities sum to P",
        metavar="P",
    )
    draw(
        "--min_p",
        type=cli.number(0, 1),
        default=DEFAULT_SAMPLING.min_p,
        help="sample from tokens at least P times as likely as the most likely one",
        metavar="P",
    )


def read_constraints(args: argparse.Namespace) -> Constraints:
    """What the flags of `add_wishes` ask of the music. With `--given` others may play than --instruments.

    Raises:
        UserError: a wish cannot be read, or two contradict each other.
    """
    if args.strict_key and args.key is None:
        raise UserError("--strict_key needs --key")
    instruments = None if args.instruments is None else parse_instruments(args.instruments)
    registers = parse_each("--register", args.register, _parse_register)
    densities = parse_each("--density", args.density, _parse_density)
    everyone, penalties = _parse_penalties(args.repetition_penalty)
    wishes = {"--register": registers, "--density": densities, "--repetition_penalty": penalties}
    for flag, named in wishes.items():
        for instrument in named:
            if instruments is not None and args.given is None and instrument not in instruments:
                raise UserError(f"{flag}: {instrument_name(instrument)} is not one of --instruments")
    try:
        return Constraints(
            signature=None if args.time_signature is None else parse_signature(args.time_signature),
            bpm=args.tempo,
            instruments=instruments,
            chords=None if args.chords is None else parse_chords(args.chords),
            scale=None if args.key is None else parse_key(args.key),
            strict_scale=args.strict_key,
            registers=registers,
            densities=densities,
            repetition_penalties=dict.fromkeys(range(vocab.DRUMS) if everyone else (), everyone) | penalties,
        )
    except ValueError as error:
        raise UserError(f"--register and --key: {error}") from None


def read_sampling(args: argparse.Namespace) -> Sampling:
    """How the flags of `add_wishes` draw tokens."""
    own = {kind: getattr(args, f"{kind}_temperature") for kind in KINDS}
    own = {kind: temperature for kind, temperature in own.items() if temperature is not None}
    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, own)


def parse_instruments(text: str, flag: str = "--instruments") -> tuple[int, ...]:
    """'drums, 33, flute' -> instrument numbers, ascending: General MIDI programs 0..127, and the drums."""
    return tuple(sorted({parse_instrument(word, flag) for word in text.split(",")}))


def parse_instrument(text: str, flag: str) -> int:
    word = text.strip().lower()
    if word in _NAMES:
        return _NAMES[word]
    if word.isdecimal() and int(word) < 128:
        return int(word)
    close = [name for name in _NAMES if word and word in name] or get_close_matches(word, _NAMES)
    hint = f"; did you mean {', '.join(close[:5])}?" if close else ""
    raise UserError(f"{flag}: '{word}' is no program number (0..127), General MIDI name or 'drums'{hint}")


def parse_signature(text: str) -> int:
    """'6/8' -> index into `vocab.SIGNATURES`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    signature = (int(match[1]), int(match[2])) if match else None
    if signature not in vocab.SIGNATURE_INDEX:
        raise UserError(
            f"--time_signature: '{text}' is not of the form N/D with N in 1..24 and D in 1, 2, 4, 8, 16, 32"
        )
    return vocab.SIGNATURE_INDEX[signature]


def parse_each(flag: str, text: str | None, parse: Callable[[str, str], Value]) -> dict[int, Value]:
    """'drums 16, piano 4' -> by instrument what `parse(flag, word)` makes of its last word.

    Raises:
        UserError: an entry is not of that form, or an instrument is named twice.
    """
    found: dict[int, Value] = {}
    for entry in () if text is None else text.split(","):
        name, _, value = entry.strip().rpartition(" ")
        if not name:
            raise UserError(f"{flag}: '{entry.strip()}' is no instrument, a space and a value (see --help)")
        instrument = parse_instrument(name, flag)
        if instrument in found:
            raise UserError(f"{flag}: {instrument_name(instrument)} is named twice")
        found[instrument] = parse(flag, value)
    return found


def _parse_penalties(text: str | None) -> tuple[float, dict[int, float]]:
    """'1, drums 0.5' -> the penalty of all but the drums, 0 without one, and those of instruments named."""
    flag, everyone, named = "--repetition_penalty", None, []
    for entry in () if text is None else text.split(","):
        if " " in entry.strip():
            named.append(entry)
        elif everyone is None:
            everyone = _parse_penalty(flag, entry)
        else:
            raise UserError(f"{flag}: '{text}' has two numbers for all; decimals are written as 1.5")
    return everyone or 0.0, parse_each(flag, ",".join(named) or None, _parse_penalty)


def _parse_penalty(flag: str, text: str) -> float:
    try:
        penalty = float(text)
    except ValueError:
        penalty = -1.0
    if not 0 <= penalty <= 100:
        raise UserError(f"{flag}: '{text.strip()}' is no number from 0 to 100")
    return penalty


def _parse_density(flag: str, text: str) -> float:
    try:
        notes = float(text)
    except ValueError:
        notes = 0.0
    if not 0 < notes <= 1000:
        raise UserError(f"{flag}: '{text}' is no number of notes from above 0 to 1000")
    return notes


def _parse_register(flag: str, text: str) -> tuple[int, int]:
    """'E1-G3', '28-55' -> MIDI pitches, both included."""
    match = re.fullmatch(r"([A-Ga-g][#b]*-?\d+|\d+)-([A-Ga-g][#b]*-?\d+|\d+)", text)
    low, high = (_parse_pitch(word) for word in match.groups()) if match else (1, 0)
    if not 0 <= low <= high <= 127:
        raise UserError(f"{flag}: '{text}' is no range from low to high of pitches 0..127 or names as C4")
    return low, high


def _parse_pitch(text: str) -> int:
    match = re.fullmatch(r"([A-Ga-g])([#b]*)(-?\d+)", text)
    if match is None:
        return int(text)
    # Cb4 is a semitone below C4, in the octave below.
    natural = pitch_class(match[1], "")
    return natural + match[2].count("#") - match[2].count("b") + 12 * (int(match[3]) + 1)


def instrument_name(instrument: int) -> str:
    return "drums" if instrument == vocab.DRUMS else PROGRAM_NAMES[instrument]
