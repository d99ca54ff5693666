"""Shards -> packed batches, in an order that depends on the seed and the epoch only.

A row holds whole samples back to back (see `packing.py`), as documents that attention does not cross.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.structure import KIND_RULE, NEAR_BARS, Structure, summary_room
from ..tokens import attributes, vocab
from ..tokens.attributes import TokenAttributes
from .augment import OFF, Augmentation, augment, find_room, room_dtype, seeds_of_epoch
from .packing import find_samples, rows_of_epoch
from .pairs import Counts, count_documents
from .shards import ShardSet


class State(NamedTuple):
    """The data position: rows `index` and after of `epoch` are still to come.

    It counts rows of the whole job, so it holds for any number of processes.
    """

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one accumulation step of one process, all N = max_seq_len tokens wide.

    ids: [B, N] int64; PAD after the last document.
    targets: [B, N] int64, the next token of the same document; -100 where there is none.
    structure: of [B, N] tokens and [B, M] summaries; M takes few values, see `summary_room`.
    num_targets: targets that are not -100.
    counts: tokens and pairs of tokens over all rows, without padding.
    unread: whether all rows are padding because the songs of one could not be read.
    """

    ids: Tensor
    targets: Tensor
    structure: Structure
    num_targets: int
    counts: Counts
    unread: bool = False

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self.counts.tokens

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """This batch on another device."""
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            structure=self.structure.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """This batch in page-locked memory, from which a GPU copies without the host."""
        facts = {name: x.pin_memory() for name, x in vars(self.structure).items() if isinstance(x, Tensor)}
        structure = replace(self.structure, **facts)
        return replace(
            self, ids=self.ids.pin_memory(), targets=self.targets.pin_memory(), structure=structure
        )


class _Epoch(NamedTuple):
    """Its number, its rows, the largest number of bars in a row, and the seeds of its samples' changes."""

    number: int
    rows: list[np.ndarray]
    most_bars: int
    seeds: np.ndarray


_NO_SAMPLES = np.zeros(0, np.int64)
_NAMES = {"train": "training", "val": "validation"}
_MOST = 0.95  # of the songs: how many a limit should keep


class PackedSongs:
    """The rows of one split, epoch by epoch.

    Args:
        shards: where the tokens are.
        split: "train" or "val".
        max_seq_len: tokens per row, N; longer songs are cut at bar lines.
        max_bars: songs with more bars are skipped; a row holds no more than that in all.
        max_samples: use only that many samples, drawn by `seed`.
        seed: of the order, not negative. The rows of an epoch follow from (seed, epoch) and the
            arguments above.
        near_bars, kind_rule: of `Structure`.
        fixed_num_summaries: give all batches of an epoch as many summary slots as its fullest row needs, for
            an attention that compiles anew for each number.
        augmentation: how far samples are changed, by (seed, epoch, sample); of the split "train" only.

    Attributes:
        samples: the `Samples` of the split, including the numbers of skipped songs and bars.
        failure: why `batches` could not read songs, in one line; None if it could so far.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        *,
        max_seq_len: int,
        max_bars: int,
        max_samples: int | None = None,
        seed: int = 0,
        near_bars: tuple[int, ...] = NEAR_BARS,
        kind_rule: str = KIND_RULE,
        fixed_num_summaries: bool = False,
        augmentation: Augmentation = OFF,
    ):
        if split != "train" and augmentation != OFF:
            raise ValueError(f"samples of the split {split!r} must stay as they are")
        self.shards, self.split, self.augmentation = shards, split, augmentation
        self.max_seq_len, self.max_bars, self.seed = max_seq_len, max_bars, seed
        self.near_bars, self.kind_rule, self.fixed_num_summaries = near_bars, kind_rule, fixed_num_summaries
        self.samples = find_samples(
            shards,
            shards.split(split),
            max_seq_len=max_seq_len,
            max_bars=max_bars,
            max_samples=max_samples,
            seed=seed,
        )
        # The last epoch asked for, in one attribute, since the loader thread reads it too.
        self._epoch = _Epoch(-1, [], 0, np.zeros(0, np.uint64))
        # Found when a sample is first read: its `Counts`, 0 until then, and which changes fit it. No pair
        # crosses documents, so counts add up.
        self._counts = np.zeros((len(self.samples), len(fields(Counts))), np.int64)
        self._room = np.zeros(len(self.samples), room_dtype(augmentation))
        self.failure: str | None = None

    def rows(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch, see `packing.rows_of_epoch`."""
        return self._of(epoch).rows

    def _of(self, epoch: int) -> "_Epoch":
        found = self._epoch
        if found.number != epoch:
            rows = rows_of_epoch(self.samples, [self.seed, epoch], self.max_seq_len, self.max_bars)
            most_bars = max((int(self.samples.bars[numbers].sum()) for numbers in rows), default=0)
            seeds = seeds_of_epoch(self.seed, epoch, len(self.samples))
            found = self._epoch = _Epoch(epoch, rows, most_bars, seeds)
        return found

    def rows_per_epoch(self, epoch: int) -> int:
        return len(self.rows(epoch))

    def batch(self, epoch: int, rows: Iterable[int]) -> Batch:
        """A batch of the given rows of an epoch; a number past the last row gives a row of padding."""
        rows = list(rows)
        of_epoch = self._of(epoch)
        shape = (len(rows), self.max_seq_len)
        ids, targets = (np.empty(shape, np.int64) for _ in range(2))
        doc, bar, inst, kind, onset = facts = [np.empty(shape, np.int32) for _ in range(5)]
        held = [of_epoch.rows[row] if row < len(of_epoch.rows) else _NO_SAMPLES for row in rows]
        numbers = np.concatenate([_NO_SAMPLES, *held])
        ends = np.cumsum(self.samples.length[numbers])
        tokens, scanned = self._documents(of_epoch, numbers, ends)
        following = np.append(tokens[1:], np.uint16(vocab.PAD))
        stop = 0
        for b, samples in enumerate(held):
            lengths = self.samples.length[samples]
            n = int(lengths.sum())
            start, stop = stop, stop + n
            ids[b, :n], targets[b, :n] = tokens[start:stop], following[start:stop]
            targets[b, np.cumsum(lengths) - 1] = vocab.IGNORE_INDEX
            doc[b, :n] = np.repeat(np.arange(len(samples), dtype=np.int32), lengths)
            bar[b, :n], inst[b, :n] = scanned.bar[start:stop], scanned.inst[start:stop]
            kind[b, :n], onset[b, :n] = scanned.kind[start:stop], scanned.onset[start:stop]
            ids[b, n:], targets[b, n:] = vocab.PAD, vocab.IGNORE_INDEX
            for fact in facts:
                fact[b, n:] = -1
        most_bars = max((int(self.samples.bars[samples].sum()) for samples in held), default=0)
        if self.fixed_num_summaries:
            most_bars = of_epoch.most_bars
        structure = Structure.build(
            *(torch.from_numpy(fact) for fact in facts),
            num_summaries=summary_room(most_bars),
            near_bars=self.near_bars,
            kind_rule=self.kind_rule,
        )
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(targets),
            structure,
            len(tokens) - len(numbers),
            Counts(*self._counts[numbers].sum(0).tolist()),
        )

    def _documents(
        self, epoch: "_Epoch", numbers: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, TokenAttributes]:
        """The given samples as an epoch has them, back to back: ids, uint16 [n], and attributes.

        Args:
            numbers: of the samples, int64 [D].
            ends: where each of them ends, int64 [D].
        """
        documents = [self.samples.read(self.shards, int(sample)) for sample in numbers]
        stored = np.concatenate([np.zeros(0, np.uint16), *documents])
        starts = ends - self.samples.length[numbers]
        stays = self.augmentation == OFF or not len(numbers)
        known = self._counts[numbers].any(axis=1).all()
        if stays or not known:
            ids, scanned = stored, attributes.scan(stored, starts)
        if not known:
            if not stays:
                self._room[numbers] = find_room(stored, starts, scanned, self.augmentation)
            # As they are stored, for some kind rules count other pairs for each order of the band.
            self._counts[numbers] = count_documents(
                starts, *vars(scanned).values(), self.near_bars, self.kind_rule
            )
        if not stays:
            seeds, room = epoch.seeds[numbers], self._room[numbers]
            ids, scanned = augment(stored, starts, seeds, room, self.augmentation)
        assert len(ids) == sum(map(len, documents)), "rows are packed by the lengths of samples"
        return ids, scanned

    def _batch_or_padding(self, epoch: int, rows: list[int]) -> Batch:
        try:
            return self.batch(epoch, rows)
        except (UserError, OSError) as error:
            said = error if isinstance(error, UserError) else f"{self.shards.folder}: {error.strerror}"
            self.failure = self.failure or str(said)
            return replace(self.batch(epoch, [self.rows_per_epoch(epoch)] * len(rows)), unread=True)

    def rows_by_rank(self, epoch: int, group: list[int], world: int) -> list[list[int]]:
        """Distribute a group of rows of an epoch over `world` processes, the same number to each.

        Processes wait for each other in every step, and rows differ in the cost of attention, roughly the sum
        of their documents' squared lengths: they are assigned from the most to the least expensive, back and
        forth.
        """
        if world == 1:
            return [group]
        of_epoch = self.rows(epoch)
        cost = [
            float((self.samples.length[of_epoch[row]] ** 2).sum()) if row < len(of_epoch) else 0.0
            for row in group
        ]
        dearest_first = np.array(group)[np.argsort(-np.array(cost), kind="stable")]
        rounds = dearest_first.reshape(-1, world)
        rounds[1::2] = rounds[1::2, ::-1].copy()
        return rounds.T.tolist()

    def left_out(self) -> str | None:
        """How much of the split is left out, and what would keep it, in one line; None if nothing is."""
        samples, songs = self.samples, self.shards.split(self.split)
        told = []
        if samples.skipped_songs:
            text = f"{samples.skipped_songs} of {len(songs)} songs have more than {self.max_bars} bars"
            enough = int(np.quantile(self.shards.bars[songs], _MOST, method="higher"))
            if enough > self.max_bars:
                text += (
                    f" (some files, as those of POP909, count a bar per beat: --max_bars {enough} keeps "
                    f"{_MOST:.0%} of the songs)"
                )
            told.append(text)
        if samples.skipped_bars:
            told.append(f"{samples.skipped_bars} bars are longer than a row of {self.max_seq_len} tokens")
        return f"left out of the {_NAMES[self.split]} split: {', '.join(told)}" if told else None

    def why_empty(self) -> str:
        """Why the split has no samples: the end of a sentence."""
        if not len(self.shards.split(self.split)):
            whole = " that is not damaged" if len(self.shards.damaged) else ""
            return f"no song{whole} fell into the {_NAMES[self.split]} split"
        return f"all songs are {self.left_out()}"

    def require_samples(self) -> None:
        """Raises UserError if there is not a single sample."""
        if not len(self.samples):
            raise UserError(f"{self.shards.folder}: nothing to read: {self.why_empty()}")

    def batches(
        self,
        state: State,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        stop_epoch: int | None = None,
    ) -> Iterator[tuple[Batch, State]]:
        """Batches of process `rank` of `world`, from `state` on, each with the state after it.

        Every step takes the next `world * batch_size` rows of the epoch, each process `batch_size` of
        them, so that all have about as much to do; in the last step of an epoch the missing rows
        are padding. Ends before `stop_epoch`, or never if that is None.

        Songs that cannot be read end nothing here, since the other processes would wait for this one: the
        batch is `unread`, and `failure` says why.

        Raises:
            UserError: there is not a single sample.
        """
        self.require_samples()
        epoch, index = state
        while stop_epoch is None or epoch < stop_epoch:
            rows = self.rows_per_epoch(epoch)
            if index < rows:
                group = list(range(index, index + world * batch_size))
                batch = self._batch_or_padding(epoch, self.rows_by_rank(epoch, group, world)[rank])
                index = min(index + world * batch_size, rows)
                yield batch, State(epoch, index) if index < rows else State(epoch + 1, 0)
            if index >= rows:
                epoch, index = epoch + 1, 0
