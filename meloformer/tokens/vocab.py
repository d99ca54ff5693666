"""The HID vocabulary: the meaning of every token id. No other module defines ids.

A family is a range of consecutive ids of one token type; `FAMILIES` lists them in id order. The grammar of
songs is in `meloformer.tokens.grammar`.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass
from functools import cache

import numpy as np

FORMAT_VERSION = 2
# Fingerprints of earlier versions, so that an error message can name the version of old data.
EARLIER_VERSIONS = {"e619bafa40d3a3fe0ce1bc25f7602ef33788cc7aa14e65fb5c2528fd96aab23f": 1}
STEPS_PER_QUARTER = 24
MAX_BAR_STEPS = 8 * STEPS_PER_QUARTER  # a longer bar is split into parts of this many steps
MAX_NOTE_STEPS = 64 * STEPS_PER_QUARTER
MIN_BPM, MAX_BPM = 4, 480  # ritardandi of real songs go below 20; MIDI has no tempo below 3.6
VELOCITY_BINS = 32
RESERVED_IDS = 8
DRUMS = 128  # the instrument number of drums; 0..127 are General MIDI programs
NO_INSTRUMENT = 129
IGNORE_INDEX = -100  # target of a token without a next token; the default of PyTorch's cross entropy

PITCH_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")

# Chord qualities as semitones above the root, in the order of the CHORD ids. Rare qualities are left out:
# their labels would seldom be right, and hard to predict.
QUALITIES: dict[str, tuple[int, ...]] = {
    "maj": (0, 4, 7),
    "min": (0, 3, 7),
    "dim": (0, 3, 6),
    "aug": (0, 4, 8),
    "sus2": (0, 2, 7),
    "sus4": (0, 5, 7),
    "5": (0, 7),
    "6": (0, 4, 7, 9),
    "7": (0, 4, 7, 10),
    "maj7": (0, 4, 7, 11),
    "min7": (0, 3, 7, 10),
    "hdim7": (0, 3, 6, 10),
    "dim7": (0, 3, 6, 9),
}

# The canonical order of instruments: that of the BAND and INST ids, in which `encode` lists and writes them.
# Drums, bass, then the General MIDI families that mostly play chords, then those that mostly play melodies.
_FAMILY_ORDER = (4, 0, 2, 3, 1, 6, 11, 5, 7, 8, 9, 10, 12, 13, 14, 15)
INSTRUMENTS = np.array([DRUMS, *(8 * family + i for family in _FAMILY_ORDER for i in range(8))])
INSTRUMENT_RANK = np.argsort(INSTRUMENTS)  # [129] instrument number -> index of its BAND and INST id

SIGNATURES: tuple[tuple[int, int], ...] = tuple((n, d) for d in (1, 2, 4, 8, 16, 32) for n in range(1, 25))
SIGNATURE_STEPS = np.array([n * 4 * STEPS_PER_QUARTER // d for n, d in SIGNATURES], dtype=np.int64)
SIGNATURE_INDEX = {signature: i for i, signature in enumerate(SIGNATURES)}


def _length_steps() -> np.ndarray:
    """Note lengths in steps: exact to a quarter, then geometric with at most 3 % error.

    The bound holds for rounding down, since a note that ends where its pitch is struck again must not become
    longer. Binary and dotted lengths are exact; between two of them are as few values as the bound allows.
    """
    exact = STEPS_PER_QUARTER
    lengths = list(range(1, exact + 1))
    kept = [exact * m // 2 for m in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)]
    for low, high in itertools.pairwise(kept):
        between = np.arange(low, high + 1)
        for parts in range(1, high - low + 1):
            grid = np.unique(np.rint(np.geomspace(low, high, parts + 1)).astype(np.int64))
            error = 1 - grid[np.searchsorted(grid, between, side="right") - 1] / between
            if error.max() <= 0.03:
                break
        lengths += grid[1:].tolist()
    return np.array(lengths, dtype=np.int64)


LENGTHS = _length_steps()


@dataclass(frozen=True)
class Family:
    """Consecutive ids `start` to `stop - 1`; id `i` has the value `i - start` and the label of that index."""

    name: str
    start: int
    labels: tuple[str, ...]

    @property
    def stop(self) -> int:
        return self.start + len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __contains__(self, token: int) -> bool:
        return self.start <= token < self.stop

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` belong to this family (bool, the shape of `ids`)."""
        return (ids >= self.start) & (ids < self.stop)


def _families() -> tuple[Family, ...]:
    chords = ("N", *(f"{root}:{quality}" for root in PITCH_NAMES for quality in QUALITIES))
    instruments = tuple("drums" if i == DRUMS else str(i) for i in INSTRUMENTS)
    labels = {
        "PAD": ("",),
        "BOS": ("",),
        "EOS": ("",),
        "BAND": instruments,
        "CHORD": chords,
        "TS": tuple(f"{n}/{d}" for n, d in SIGNATURES),
        "CUT": tuple(str(steps) for steps in range(1, MAX_BAR_STEPS)),
        "BPM": tuple(str(bpm) for bpm in range(MIN_BPM, MAX_BPM + 1)),
        "INST": instruments,
        "T": tuple(str(step) for step in range(MAX_BAR_STEPS)),
        "P": tuple(str(pitch) for pitch in range(128)),
        "L": tuple(str(steps) for steps in LENGTHS),
        "V": tuple(str(b) for b in range(VELOCITY_BINS)),
        # In no song yet. Planned for infilling: a later part of the song, given first, so that the model sees
        # what follows. With ids reserved for it, that needs no new format of data and checkpoints.
        "RESERVED": tuple(str(i) for i in range(RESERVED_IDS)),
    }
    families, start = [], 0
    for name, family_labels in labels.items():
        families.append(Family(name, start, family_labels))
        start += len(family_labels)
    return tuple(families)


FAMILIES = _families()
PAD_FAMILY, BOS_FAMILY, EOS_FAMILY, BAND, CHORD, TS, CUT, BPM, INST, T, P, L, V, RESERVED = FAMILIES
PAD, BOS, EOS = PAD_FAMILY.start, BOS_FAMILY.start, EOS_FAMILY.start
VOCAB_SIZE = RESERVED.stop


_FAMILY_OF = tuple(family for family in FAMILIES for _ in family.labels)


def family_of(token: int) -> Family:
    """The family that a token id (0 <= token < VOCAB_SIZE) belongs to."""
    return _FAMILY_OF[token]


@cache
def names() -> tuple[str, ...]:
    """The name of every id, e.g. `T_12`, `CHORD_A:min7`, `INST_drums`, `BOS`."""
    return tuple(f"{f.name}_{label}" if label else f.name for f in FAMILIES for label in f.labels)


@cache
def ids_by_name() -> dict[str, int]:
    """The id of every name: the inverse of `names`."""
    return {name: i for i, name in enumerate(names())}


def to_json() -> dict:
    """Everything that defines the meaning of the ids, as plain JSON values."""
    return {
        "format": "HID",
        "version": FORMAT_VERSION,
        "steps_per_quarter": STEPS_PER_QUARTER,
        "tokens": list(names()),
    }


@cache
def fingerprint() -> str:
    """SHA-256 (64 hex digits) of the vocabulary; shards and checkpoints carry it."""
    text = json.dumps(to_json(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def mismatch(fingerprint: str) -> str:
    """How data with this other fingerprint was written: completes an error message "... was written ..."."""
    version = EARLIER_VERSIONS.get(fingerprint)
    if version is None:
        return "with another tokenizer"
    return f"in version {version} of the token format, and this program reads version {FORMAT_VERSION}"


def velocity_to_bin(velocity: np.ndarray) -> np.ndarray:
    """The bin (0..31) of each MIDI velocity (1..127)."""
    return np.asarray(velocity) * VELOCITY_BINS // 128


def bin_to_velocity(index: np.ndarray) -> np.ndarray:
    """The MIDI velocity in the middle of each bin."""
    return np.asarray(index) * (128 // VELOCITY_BINS) + 64 // VELOCITY_BINS


def length_to_index(steps: np.ndarray) -> np.ndarray:
    """Index into `LENGTHS` of the nearest length (the shorter one on a tie)."""
    steps = np.clip(np.asarray(steps), 1, MAX_NOTE_STEPS)
    above = np.searchsorted(LENGTHS, steps)
    below = np.maximum(above - 1, 0)
    return np.where(steps - LENGTHS[below] <= LENGTHS[above] - steps, below, above)


def length_to_index_at_most(steps: np.ndarray) -> np.ndarray:
    """Index into `LENGTHS` of the longest length that is at most `steps` (steps >= 1)."""
    return np.searchsorted(LENGTHS, np.asarray(steps), side="right") - 1
