"""A procedural composer: multi-instrument songs with real form, for the demo, tests and benchmarks.

A song is a sequence of sections (intro, verse, chorus, bridge, ...). A section that returns repeats its
chords and patterns with small variations, so that a model can learn from what lies many bars back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from miditoolkit import Instrument, Marker, MidiFile, Note, TempoChange, TimeSignature

from ..midi.writer import write_midi
from ..tokens.vocab import QUALITIES, STEPS_PER_QUARTER
from .arrangement import (
    COMMON_SIGNATURES,
    CRASH,
    KICK,
    LOUDNESS,
    METRES,
    PROGRESSIONS,
    ROLES,
    SCALES,
    Chord,
    Dice,
    Harmony,
    Hit,
    Metre,
    Pattern,
    drum_fill,
    drum_groove,
    voiced_pitch,
)

TICKS_PER_STEP = 20
MAX_BARS = 400


def compose(
    seed: int,
    *,
    bars: int | None = None,
    signature: tuple[int, int] | None = None,
    tempo: float | None = None,
) -> MidiFile:
    """Compose one song.

    The same arguments give the same song on every platform and Python version. Consecutive seeds
    spread evenly over the lengths, from 4 bars to more than 20,000 tokens.

    Args:
        seed: which song.
        bars: its exact number of bars; drawn if None.
        signature: the time signature of every bar, one of `METRES`; if None it is drawn, and the
            bridge may be in another.
        tempo: quarter notes per minute throughout; if None it is drawn, and may change.

    Returns:
        A song at 480 ticks per quarter with every note on a grid of 24 steps per quarter, and a
        marker at each section. It has 3 to 8 programs, drums counted. No two notes of one part and
        pitch overlap. A bar in the middle may be empty; the first and last never are.

    Raises:
        ValueError: `bars` is below 1, or `signature` is not one of `METRES`.
    """
    if bars is not None and bars < 1:
        raise ValueError(f"a song has at least 1 bar, not {bars}")
    if signature is not None and signature not in METRES:
        raise ValueError(f"no patterns for the time signature {signature}; there are {sorted(METRES)}")
    dice = Dice(seed, "song")
    band = _Band(seed)
    metre = bridge = METRES[dice.choice(COMMON_SIGNATURES)]
    if dice.chance(0.4):
        bridge = METRES[dice.choice(COMMON_SIGNATURES)]
    if signature is not None:
        metre = bridge = METRES[signature]
    bpm = bridge_bpm = float(dice.integer(66, 164))
    if dice.chance(0.5):
        bridge_bpm = float(round(bpm * dice.choice((0.75, 0.8, 0.9, 1.1, 1.2))))
    if tempo is not None:
        bpm = bridge_bpm = tempo
    bars = bars or _draw_bars(seed, len(band.programs) + band.has_drums, metre)
    silent = dice.integer(2, bars - 2) if bars > 8 and dice.chance(0.3) else None

    midi = MidiFile(ticks_per_beat=TICKS_PER_STEP * STEPS_PER_QUARTER)
    start = bar = 0
    for section in _form(dice, bars, (metre, bpm), (bridge, bridge_bpm)):
        _announce(midi, section, start)
        band.begin(section)
        for index in range(section.bars):
            if bar == bars - 1:
                band.play_last_bar(start, section)
            elif bar != silent:
                band.play_bar(start, section, index)
            start += section.metre.steps
            bar += 1
    midi.instruments = band.instruments()
    midi.max_tick = start * TICKS_PER_STEP
    return midi


def _draw_bars(seed: int, parts: int, metre: Metre) -> int:
    """A number of bars for a number of tokens that is log-uniform over consecutive seeds."""
    spread = seed * 2654435769 % 2**32 / 2**32  # multiples of the golden ratio fill [0, 1) evenly
    tokens = 300 * 75**spread
    tokens_per_bar = 24 * parts * metre.steps / (4 * STEPS_PER_QUARTER)  # as dense songs come out
    return min(max(round(tokens / tokens_per_bar), 4), MAX_BARS)


def _announce(midi: MidiFile, section: "Section", start: int) -> None:
    """Write the section's name, and its time signature and tempo where they change."""
    tick = start * TICKS_PER_STEP
    midi.markers.append(Marker(section.name, tick))
    signature = section.metre.signature
    last = midi.time_signature_changes[-1:]
    if not last or (last[0].numerator, last[0].denominator) != signature:
        midi.time_signature_changes.append(TimeSignature(*signature, tick))
    if not midi.tempo_changes or midi.tempo_changes[-1].tempo != section.tempo:
        midi.tempo_changes.append(TempoChange(section.tempo, tick))


@dataclass(frozen=True)
class Section:
    """A section of the form. Sections of equal `theme` and metre share chords and patterns."""

    name: str
    theme: str
    bars: int
    metre: Metre
    tempo: float
    tonic: int  # pitch class


def _form(dice: Dice, bars: int, main: tuple[Metre, float], bridge: tuple[Metre, float]) -> Iterable[Section]:
    """Sections that fill exactly `bars` bars."""
    unit = 4 if bars < 40 else 8 if bars < 160 else 16
    tonic = dice.integer(0, 11)
    lifted = (tonic + dice.choice((0, 0, 1, 2))) % 12
    outro = unit // 2
    left = bars
    if left > unit:
        yield Section("intro", "intro", unit // 2, *main, tonic)
        left -= unit // 2
    cycle = 0
    while left > outro:
        for section in (
            Section("verse", "verse", unit, *main, tonic),
            Section("chorus", "chorus", unit, *main, tonic),
            Section("verse", "verse", unit, *main, tonic),
            Section("chorus", "chorus", unit, *main, tonic),
            Section("bridge", f"bridge {cycle}", unit, *bridge, tonic),
            Section("chorus", "chorus", unit, *main, lifted),
        ):
            length = min(section.bars, left - outro)
            if length > 0:
                yield replace(section, bars=length)
                left -= length
        cycle += 1
    yield Section("outro", "intro", left, *main, tonic)


@dataclass(frozen=True)
class _Theme:
    progression: list[str]
    patterns: dict[str, Pattern]  # by role
    groove: list[Hit]


class _Band:
    """The instruments of one song, the themes invented so far, and the notes played so far."""

    def __init__(self, seed: int):
        dice = Dice(seed, "band")
        roles = ["bass", "comp", "lead"]
        extras = [role for role in ROLES if role not in roles]
        for _ in range(dice.integer(0, len(extras))):
            roles.append(extras.pop(dice.integer(0, len(extras) - 1)))
        self.programs = {role: dice.choice(ROLES[role].programs) for role in ROLES if role in roles}
        self.has_drums = dice.chance(0.85)
        self.mode = dice.choice(("major", "minor"))
        self.swing = dice.chance(0.25)
        self.seed = seed
        self.dice = Dice(seed, "performance")
        self.themes: dict[tuple[str, Metre], _Theme] = {}
        self.notes: dict[str, list[Note]] = {}

    def begin(self, section: Section) -> None:
        """Choose what this section plays: a new theme or a variation of a known one, and which roles rest."""
        key = (section.theme, section.metre)
        returning = key in self.themes
        if not returning:
            self.themes[key] = self._invent(section)
        theme = self.themes[key]
        taste = Dice(self.seed, section.theme, section.name)
        playing = [role for role in self.programs if taste.chance(ROLES[role].presence.get(section.name, 1))]
        self.patterns = {role: theme.patterns[role] for role in playing or ["comp"]}
        if returning:
            varied = {role: self._vary(self.patterns[role]) for role in ("lead", "riff") if role in playing}
            self.patterns.update(varied)
        if "harmony" in playing:  # a third below the lead
            lead = self.patterns.get("lead", theme.patterns["lead"])
            self.patterns["harmony"] = [[hit._replace(tone=hit.tone - 2) for hit in bar] for bar in lead]
        drums = {"intro": 0.4, "bridge": 0.8, "outro": 0.6}.get(section.name, 1)
        self.groove = theme.groove if self.has_drums and taste.chance(drums) else []
        self.chords = [Chord.from_numeral(numeral, section.tonic) for numeral in theme.progression]

    def play_bar(self, start: int, section: Section, index: int) -> None:
        """Play bar `index` of the section, which starts at step `start`."""
        chord, following = (self.chords[i % len(self.chords)] for i in (index, index + 1))
        harmony = Harmony(chord, following, self._scale(section))
        loudness = LOUDNESS[section.name]
        for role, pattern in self.patterns.items():
            for hit in pattern[index % len(pattern)]:
                self._play(role, start, hit, ROLES[role].pitch(hit, ROLES[role].low, harmony), loudness)
        groove = self.groove
        if groove and (index + 1 == section.bars or (index % 4 == 3 and self.dice.chance(0.4))):
            groove = drum_fill(self.dice, section.metre, self.swing, groove)
        if groove and index == 0 and section.name != "intro":
            groove = [*groove, Hit(0, 6, CRASH, 0.8)]
        for hit in groove:
            self._play("drums", start, hit, hit.tone, loudness)

    def play_last_bar(self, start: int, section: Section) -> None:
        """All roles hold the tonic chord."""
        tonic = Chord(section.tonic, QUALITIES["maj" if self.mode == "major" else "min"])
        harmony = Harmony(tonic, tonic, self._scale(section))
        for role in self.programs:
            for tone in (0, 1, 2) if ROLES[role].pitch is voiced_pitch else (0,):
                hit = Hit(0, section.metre.steps, tone, 1.0)
                self._play(role, start, hit, ROLES[role].pitch(hit, ROLES[role].low, harmony), 72)
        for drum in (KICK, CRASH) if self.has_drums else ():
            self._play("drums", start, Hit(0, STEPS_PER_QUARTER, drum, 1.0), drum, 72)

    def instruments(self) -> list[Instrument]:
        """The tracks, one per program, notes sorted by onset and pitch."""
        return [
            Instrument(
                self.programs.get(part, 0),
                part == "drums",
                part,
                sorted(notes, key=lambda n: (n.start, n.pitch)),
            )
            for part, notes in self.notes.items()
        ]

    def _invent(self, section: Section) -> _Theme:
        dice = Dice(self.seed, section.theme, section.metre.signature)
        return _Theme(
            dice.choice(PROGRESSIONS[self.mode]).split(),
            {role: ROLES[role].pattern(dice, section.metre, self.swing) for role in self.programs},
            drum_groove(dice, section.metre, self.swing, section.name),
        )

    def _vary(self, pattern: Pattern) -> Pattern:
        """A copy with a few notes moved or left out."""
        dice = self.dice
        return [
            [
                hit._replace(tone=max(hit.tone + dice.choice((-1, 1)), 0)) if dice.chance(0.12) else hit
                for hit in bar
                if hit.step == 0 or not dice.chance(0.08)
            ]
            for bar in pattern
        ]

    def _scale(self, section: Section) -> frozenset[int]:
        return frozenset((section.tonic + step) % 12 for step in SCALES[self.mode])

    def _play(self, part: str, start: int, hit: Hit, pitch: int, loudness: int) -> None:
        velocity = int(loudness + 24 * (hit.accent - 0.4)) + self.dice.integer(-4, 4)
        begin = (start + hit.step) * TICKS_PER_STEP
        end = begin + hit.length * TICKS_PER_STEP
        self.notes.setdefault(part, []).append(Note(velocity, pitch, begin, end))


def compose_corpus(folder: str | Path, count: int, seed: int, first: int = 0) -> list[Path]:
    """Write songs of varied lengths as `song-0000.mid`, ... into `folder`, made if missing.

    Song i of a seed is the same whatever `count` and `first` are: a corpus can be written in pieces.

    Args:
        folder: where the files go.
        count: how many songs.
        seed: which corpus.
        first: the number of the first song.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(first, first + count):
        paths.append(folder / f"song-{number:04d}.mid")
        write_midi(compose(seed * 100_003 + number), paths[-1])
    return paths
