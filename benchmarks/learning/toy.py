"""What a toy that copies and counts needs for INST and CHORD: the least that a model should reach.

Two toys predict each INST and each CHORD token of the validation songs from what stands before it in the
song, told that a token of that family comes. The *fixed* one mixes its guesses with weights set by hand and
knows of no training song but how frequent each chord is. The *fitted* one adds counts from the training songs
and, for INST, the rule that only instruments of the band that stand later in its list may follow; its weights
are fitted on training songs left out of the counts, and so is how far they shift, in each song, to what has
guessed well there.

`python -m benchmarks.learning.toy --data DIR` prints both.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meloformer import cli
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.tokens import vocab

CHORDS, INSTRUMENTS = len(vocab.CHORD), len(vocab.INST)
CHORD_ORDER, INST_ORDER = 4, 3  # how many earlier labels the counts look at
BARS_AGO = (1, 2, 4, 8)
HELD_OUT = 10  # every so many-th training song fits the weights
FIT_SONGS = 100  # at most
SHARES = (0.03, 0.1, 0.3, 1.0)  # of the weight that goes back to the fitted ones at every token: to choose of
# Guesses in the order of `inst_guesses` and `chord_guesses`.
FIXED_INST = np.array([0.0, 0.28, 0.7, 0.0, 0.02])
FIXED_CHORD = np.array([0.1, 0.25, 0.15, 0.1, 0.2, 0.2])

Guess = np.ndarray | None  # probabilities by label, float64; None where there is nothing to guess from


class Song(NamedTuple):
    """Of one song: chord label of each bar; instruments of each bar in their order; the band in its order.

    Instruments are indices of the INST and BAND families.
    """

    chords: list[int]
    bars: list[list[int]]
    band: list[int]


def read_song(ids: np.ndarray) -> Song:
    """The song of token ids [n]."""
    is_chord, is_inst = vocab.CHORD.mask(ids), vocab.INST.mask(ids)
    bars: list[list[int]] = [[] for _ in range(int(is_chord.sum()))]
    for bar, inst in zip((np.cumsum(is_chord) - 1)[is_inst].tolist(), ids[is_inst].tolist()):
        bars[bar].append(inst - vocab.INST.start)
    chords = (ids[is_chord].astype(int) - vocab.CHORD.start).tolist()
    return Song(chords, bars, (ids[vocab.BAND.mask(ids)].astype(int) - vocab.BAND.start).tolist())


class Counts:
    """Probabilities of the next label after the last `order` ones: counts of each order, mixed with those of
    the order below by Witten and Bell's rule, down to a uniform distribution.

    Args:
        labels: how many there are to guess; contexts may hold others.
    """

    def __init__(self, labels: int, order: int):
        self._labels, self._order = labels, order
        self._counts: dict[tuple[int, ...], Counter] = defaultdict(Counter)
        self._made: dict[tuple[int, ...], np.ndarray] = {}

    def add(self, before: tuple[int, ...], label: int) -> None:
        for length in range(min(self._order, len(before)) + 1):
            self._counts[before[len(before) - length :]][label] += 1

    def after(self, before: tuple[int, ...]) -> np.ndarray:
        """Probabilities, float64 [labels], to be read only; call it when all is counted."""
        before = before[max(0, len(before) - self._order) :]
        if before not in self._made:
            lower = self.after(before[1:]) if before else np.full(self._labels, 1 / self._labels)
            found = self._counts.get(before)
            if found:
                mixed = len(found) * lower
                mixed[list(found)] += list(found.values())
                lower = mixed / (len(found) + found.total())
            self._made[before] = lower
        return self._made[before]


class Step(NamedTuple):
    """A token to guess: the guesses, and the place of the right label in each."""

    guesses: list[Guess]
    label: int


def _sure(labels: int, label: int) -> np.ndarray:
    found = np.zeros(labels)
    found[label] = 1
    return found


def _share(counts: np.ndarray) -> Guess:
    total = counts.sum()
    return counts / total if total else None


def chord_steps(song: Song, trained: Counts, fitted: bool) -> Iterator[Step]:
    """For each bar: counts of the training songs, of this song, the labels some bars ago; if fitted, what
    followed the last label in this song, and any label alike."""
    heard, followers = np.zeros(CHORDS), defaultdict(lambda: np.zeros(CHORDS))
    uniform = np.full(CHORDS, 1 / CHORDS)
    for bar, label in enumerate(song.chords):
        past = tuple(song.chords[max(0, bar - CHORD_ORDER) : bar])
        ago = [_sure(CHORDS, song.chords[bar - n]) if bar >= n else None for n in BARS_AGO]
        guesses = [trained.after(past if fitted else ()), _share(heard), *ago]
        if fitted:
            guesses += [_share(followers[past[-2:]]), _share(followers[past[-1:]]), uniform]
        yield Step(guesses, label)
        heard[label] += 1
        for context in (past[-2:], past[-1:]):
            followers[context][label] += 1


def inst_steps(song: Song, trained: Counts, fitted: bool) -> Iterator[Step]:
    """For each instrument of a bar: counts of the training songs, of this song, the next instrument of the
    bar before, the one that followed this instrument in its last bar, any that may follow alike."""
    may_follow = {inst: np.array(song.band[place + 1 :]) for place, inst in enumerate(song.band)}
    whole_band, anyone = np.array(song.band), np.arange(INSTRUMENTS)
    rank = {inst: place for place, inst in enumerate(song.band)}
    heard, follower, before = np.zeros(INSTRUMENTS), {}, []
    for bar, past in zip(song.bars, _inst_contexts(song)):
        current = None
        for inst, context in zip(bar, past):
            allowed = anyone if not fitted else whole_band if current is None else may_follow[current]
            following = (other for other in before if current is None or rank[other] > rank[current])
            copies = (next(following, None), follower.get(current))
            guesses = [_share(trained.after(context)[allowed]), _share(heard[allowed])]
            for copy in copies:
                place = np.flatnonzero(allowed == copy) if copy is not None else ()
                guesses.append(_sure(len(allowed), place[0]) if len(place) else None)
            guesses.append(np.full(len(allowed), 1 / len(allowed)))
            yield Step(guesses, int(np.flatnonzero(allowed == inst)[0]))
            heard[inst] += 1
            follower[current] = inst
            current = inst
        before = bar or before


def _inst_contexts(song: Song) -> Iterator[list[tuple[int, ...]]]:
    """For each bar, what stands before each of its instruments; a mark stands at the beginning of a bar."""
    past: tuple[int, ...] = ()
    for bar in song.bars:
        contexts = []
        past = (*past, INSTRUMENTS)[-INST_ORDER:]
        for inst in bar:
            contexts.append(past)
            past = (*past, inst)[-INST_ORDER:]
        yield contexts


def chances(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """What each guess gives the right label, float64 [guesses], and which guesses there are, bool."""
    there = np.array([guess is not None for guess in step.guesses])
    return np.array([0.0 if guess is None else guess[step.label] for guess in step.guesses]), there


def mixed(weights: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The weights of the guesses that there are, of sum 1."""
    kept = weights * there
    return kept / kept.sum()


def fit(steps: list[tuple[np.ndarray, np.ndarray]], rounds: int = 20) -> np.ndarray:
    """Weights by expectation maximisation over the `chances` of steps."""
    found, there = (np.array(part) for part in zip(*steps))
    weights = np.full(found.shape[1], 1 / found.shape[1])
    for _ in range(rounds):
        part = weights * there
        part = found * part / part.sum(1, keepdims=True)
        weights = (part / part.sum(1, keepdims=True)).mean(0) + 1e-6
        weights /= weights.sum()
    return weights


def nats(steps: Iterable[Step], weights: np.ndarray, share: float = 1.0) -> list[float]:
    """Nats of each step of one song.

    Args:
        share: of the weight that goes back to `weights` at every step; the rest follows the guesses that were
            right. 1 keeps the weights as they are.
    """
    found, own = [], weights
    for step in steps:
        of_label, there = chances(step)
        parts = mixed(own, there) * of_label
        chance = parts.sum()
        found.append(-math.log(chance))
        if share < 1:
            # Guesses that were not made keep their weight.
            after = np.where(there, parts / chance * (own * there).sum(), own)
            own = share * weights + (1 - share) * after
    return found


def measure(shards: ShardSet, max_bars: int | None = None) -> dict:
    """Nats per token of both toys over the validation songs, as JSON values.

    Args:
        max_bars: leave out songs of more bars, as training does.

    Raises:
        UserError: there are too few songs.
    """
    names = {
        split: [n for n in shards.split(split) if max_bars is None or shards.bars[n] <= max_bars]
        for split in ("train", "val")
    }
    if len(names["train"]) < 2 or not names["val"]:
        raise UserError(f"{shards.folder}: needs two training songs and a validation song")
    training, validation = ([read_song(shards[n]) for n in names[split]] for split in ("train", "val"))
    held = training[::HELD_OUT]
    counted = [song for number, song in enumerate(training) if number % HELD_OUT]
    partly, wholly = count(counted), count(training)
    fixed = {"CHORD": FIXED_CHORD, "INST": FIXED_INST}
    result: dict = {"songs": len(validation), "fixed": {}, "fitted": {}, "targets": {}}
    for name, steps in (("CHORD", chord_steps), ("INST", inst_steps)):
        fit_on = [list(steps(song, partly[name], True)) for song in held[:FIT_SONGS]]
        fitted = fit([chances(step) for song in fit_on for step in song])
        share = min(SHARES, key=lambda share: sum(sum(nats(song, fitted, share)) for song in fit_on))
        by_hand, by_fit = [], []
        for song in validation:
            by_hand += nats(steps(song, wholly[name], False), fixed[name])
            by_fit += nats(steps(song, wholly[name], True), fitted, share)
        result["fixed"][name] = sum(by_hand) / len(by_hand)
        result["fitted"][name] = sum(by_fit) / len(by_fit)
        result["targets"][name] = len(by_fit)
    return result


def count(songs: list[Song]) -> dict[str, Counts]:
    """Counts of both families in these songs."""
    found = {"CHORD": Counts(CHORDS, CHORD_ORDER), "INST": Counts(INSTRUMENTS, INST_ORDER)}
    for song in songs:
        for bar, label in enumerate(song.chords):
            found["CHORD"].add(tuple(song.chords[max(0, bar - CHORD_ORDER) : bar]), label)
        for bar, contexts in zip(song.bars, _inst_contexts(song)):
            for inst, context in zip(bar, contexts):
                found["INST"].add(context, inst)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.learning.toy", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder written by meloformer.preprocess")
    found = measure(ShardSet(parser.parse_args(argv).data))
    print(f"nats per token on {found['songs']:,} validation songs, given the family")
    for toy in ("fixed", "fitted"):
        print(f"{toy:7}" + "".join(f"  {name} {value:.3f}" for name, value in found[toy].items()))


if __name__ == "__main__":
    cli.run(main)
