"""The reader that goes token by token against the scans over whole songs."""

import numpy as np
import pytest
import torch

from meloformer.kernels.structure import Structure
from meloformer.model.inputs import ChordGuesses, InputFeatures, read_context
from meloformer.model.token_reader import TokenReader
from meloformer.tokens import attributes, vocab

SCANNED = ("bar", "inst", "kind", "onset")


def by_scan(ids: np.ndarray) -> dict[str, list[int]]:
    scanned = attributes.scan(ids)
    fields = {name: torch.from_numpy(getattr(scanned, name)[None]) for name in SCANNED}
    structure = Structure.build(torch.zeros(1, len(ids), dtype=torch.long), **fields)
    features, guesses = read_context(torch.from_numpy(ids.astype(np.int64))[None], structure)
    columns = fields | features._asdict() | guesses._asdict() | {"position": structure.position}
    return {"token": ids.tolist()} | {name: values[0].tolist() for name, values in columns.items()}


def by_reader(ids: np.ndarray) -> dict[str, list[int]]:
    reader = TokenReader()
    rows = [fact._asdict() for fact in map(reader.push, ids.tolist())]
    for row in rows:
        row |= row.pop("features")._asdict() | row.pop("guesses")._asdict()
    return {name: [row[name] for row in rows] for name in rows[0]}


def later_part(ids: np.ndarray, bar: int) -> np.ndarray:
    """The sample of a song that begins at a bar line."""
    point = int(attributes.cut_points(ids)[bar])
    header, skip = attributes.restated(ids, point)
    return np.concatenate((header, ids[point + skip :]))


def test_the_reader_says_of_each_token_what_the_scans_say(songs):
    cut = [later_part(ids, len(attributes.cut_points(ids)) // 2) for ids in songs[8:12]]
    for ids in [*songs[:8], *cut]:
        expected, got = by_scan(ids), by_reader(ids)
        assert got.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(got[name], values, name)


@pytest.mark.parametrize("seed", range(5))
def test_bars_that_repeat_in_any_order(seed):
    """Few labels, instruments and notes, so that the same places return often, with different followers."""
    random = np.random.default_rng(seed)
    ids = [vocab.BOS, vocab.BAND.start, vocab.BAND.start + 1]
    for _ in range(60):
        ids.append(vocab.CHORD.start + random.integers(3))
        for _group in range(random.integers(3)):
            ids += [vocab.INST.start + random.integers(2), vocab.T.start + random.integers(3)]
            for _ in range(random.integers(1, 4)):
                family = (vocab.T, vocab.P, vocab.L, vocab.V, vocab.P)[random.integers(5)]
                ids.append(family.start + random.integers(3))
    ids = np.array(ids)
    expected, got = by_scan(ids), by_reader(ids)
    for name in (*SCANNED, *InputFeatures._fields, *ChordGuesses._fields):
        np.testing.assert_array_equal(got[name], expected[name], name)
        assert len(set(got[name])) > 1, name
