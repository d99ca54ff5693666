"""The bytes of decoding steps, counted by hand."""

import numpy as np
import pytest

from benchmarks.generating.bandwidth import (
    SUMMARY,
    TOKEN,
    Row,
    StepBytes,
    rows_of_song,
    steps_of_graphs,
    steps_of_loop,
)
from benchmarks.generating.songs import song
from meloformer.generation.device.cache import Sight
from meloformer.generation.device.loop import Slots
from meloformer.generation.draft import Draft
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import vocab

# Two layers, so that there is one which is not the last.
TINY = ModelConfig(layers=2, dim=8, heads=2, ffn=5)
V = vocab.VOCAB_SIZE


def bars(*lengths: int) -> np.ndarray:
    """A song of a piano: BOS, a band, and bars that have so many tokens, CHORD and INST among them."""
    of_bar = [vocab.CHORD.start, vocab.INST.start + 1]
    note = [vocab.T.start, vocab.P.start + 60, vocab.L.start, vocab.V.start]
    ids = [vocab.BOS, vocab.BAND.start + 1]
    for length in lengths:
        ids += (of_bar + note * length)[:length]
    return np.array(ids)


def test_a_dense_token_sees_itself_and_all_before_it():
    rows = rows_of_song(bars(6, 6), 5, 12, TINY.as_dense())
    assert rows == [[Row(TOKEN, position + 1)] for position in range(5, 12)]


def test_places_of_a_sparse_song():
    """Near bars are 0 and 1, and there is one instrument."""
    config = ModelConfig(layers=1, dim=8, heads=2, ffn=5, near_bars=(0, 1), kind_rule="any")
    ids = bars(6, 6, 6)  # tokens 0 to 7 are of the first bar, then 6 each
    rows = rows_of_song(ids, 7, 20, config)
    assert len(rows) == 13
    assert rows[0] == [Row(TOKEN, 8)]
    # CHORD of the second bar: the summary of 8 tokens and of itself, then all 9 tokens and that summary.
    assert rows[1] == [Row(SUMMARY, 9), Row(TOKEN, 10)]
    # CHORD of the third bar: 6 tokens and two summaries. It has no instrument, so of the first bar it sees
    # only what is global: BOS, BAND, CHORD; of the second all 6, itself, and two summaries.
    assert rows[7] == [Row(SUMMARY, 8), Row(TOKEN, 12)]
    # INST of the third bar sees all of its instrument: 8 + 6 + 2 tokens, and two summaries.
    assert rows[8] == [Row(TOKEN, 18)]


@pytest.mark.parametrize("dense", [False, True])
def test_counted_places_are_those_that_a_step_sees(dense, monkeypatch):
    """The masks of the plain step, slot by slot, while a composed song is written."""
    config = TINY.as_dense() if dense else TINY
    ids, begin = song(3, 600, 200)
    seen: list[list[int]] = []
    places = Sight.places

    def counted(self, *args):
        mask = places(self, *args)
        seen.append((mask[:, :-1].sum(dim=1)).tolist())  # the last place is nobody's
        return mask

    monkeypatch.setattr(Sight, "places", counted)
    model = MeloFormer(config).eval()
    drafts = [Draft(ids[:begin], max_tokens=n) for n in (120, 40)]
    queues = [ids[begin : begin + 120].tolist()] * 2
    for _ in Slots(model, drafts, 4096, queues=queues).write():
        pass
    rows = [rows_of_song(ids, begin - 1, begin - 1 + n, config) for n in (120, 40)]
    expected = [sum(row.places for row in step) for step in steps_of_graphs(rows)]
    assert [sum(step) for step in seen][: len(expected)] == expected
    assert not any(map(sum, seen[len(expected) :]))
    assert dense or sum(len(mine) == 2 for mine in rows[0]) > 0  # bars ended meanwhile


def test_bytes_of_steps_of_a_dense_model():
    dense = MeloFormer(ModelConfig(layers=2, dim=8, heads=2, ffn=5, dense=True)).bfloat16()
    # Gains of two norms; queries, keys, values and output; gate, up and down.
    layer = 2 * 8 + 4 * 8 * 8 + 3 * 8 * 5
    weights = 2 * (2 * layer + 8 + V * 8 + 6 * 8)  # bfloat16; last norm, head, six gates
    rows = [Row(TOKEN, 10), Row(TOKEN, 7)]
    assert StepBytes(dense)(rows) == weights + 17 * 2 * 2 * 8 * 2  # layers, keys and values, channels, bytes
    assert StepBytes(dense, graphs=True)(rows) == weights + 17 * (2 * 2 * 8 * 2 + 4)
    assert StepBytes(dense)([]) == 0


def test_bytes_of_steps_of_a_sparse_model():
    model = MeloFormer(TINY)
    ffn = 8 + 3 * 8 * 5  # its norm too
    tokens = 2 * (8 + 4 * 8 * 8 + ffn) + 8 + V * 8 + 6 * 8
    # Norm, queries, keys and values, second keys and values; in the first layer output and feed-forward.
    summary_alone = 2 * (8 + 3 * 8 * 8 + 2 * 8 * 8) + 8 * 8
    step, place = StepBytes(model), 2 * 2 * 8 * 4
    assert step([Row(TOKEN, 10)]) == 4 * tokens + 10 * place
    assert step([Row(SUMMARY, 3)]) == 4 * (summary_alone + ffn) + 3 * place
    assert step([Row(SUMMARY, 3), Row(TOKEN, 10)]) == 4 * (tokens + summary_alone) + 13 * place


def test_int8_is_of_the_matrices_of_layers():
    model = MeloFormer(TINY)
    outputs = 2 * (3 * 8 + 8 + 2 * 5 + 8)  # each with a step of two bytes
    matrices = 2 * (4 * 8 * 8 + 3 * 8 * 5)
    rest = 4 * (2 * (8 + 8) + 8 + V * 8 + 6 * 8)
    assert StepBytes(model, int8=True)([Row(TOKEN, 0)]) == matrices + 2 * outputs + rest


def test_graphs_have_a_step_more_for_each_bar():
    one, two = Row(TOKEN, 1), Row(SUMMARY, 2)
    songs = [[[one], [two, one]], [[one], [one]]]
    assert list(steps_of_loop(songs)) == [[one, one], [two, one, one]]
    assert list(steps_of_graphs(songs)) == [[one, one], [two, one], [one]]
