"""The benchmark of the loader compares the same batches with and without augmentation."""

import pytest

from benchmarks import loader
from meloformer.data import augment, batches
from meloformer.errors import UserError


def test_both_make_the_same_rows_and_each_its_own_changes(shards, monkeypatch):
    made, make = [], batches.PackedSongs.batch

    def batch(self, epoch, rows):
        out = make(self, epoch, rows)
        made.append((self.augmentation, rows, out.tokens))
        return out

    monkeypatch.setattr(batches.PackedSongs, "batch", batch)
    row = loader.measure(shards, 1024, 2, batches=3, pairs=2, on=loader.ON)
    assert loader.ON != augment.OFF
    in_turn = made[2 * row["batches"] :]
    assert [settings for settings, _, _ in in_turn] == [augment.OFF, loader.ON] * 3 * 2
    assert [what[1:] for what in in_turn[::2]] == [what[1:] for what in in_turn[1::2]]
    assert row["tokens"] == sum(tokens for _, _, tokens in in_turn[:6:2])
    off, on = (
        row[key]["least"] * row["tokens"] for key in ("us_per_1000_tokens", "us_per_1000_tokens_augmented")
    )
    assert row["percent_added"]["least"] == pytest.approx((on / off - 1) * 100)
    added = row["percent_added"]
    assert added["q25"] <= added["median"] <= added["q75"]


def test_seconds_become_microseconds_per_thousand_tokens(shards, monkeypatch):
    """A clock that gives every batch 2 ms, and with augmentation 2.5."""
    spent = {augment.OFF: 2e-3, loader.ON: 2.5e-3}
    monkeypatch.setattr(loader, "_seconds", lambda songs, *_: spent[songs.augmentation])
    row = loader.measure(shards, 1024, 2, batches=3, pairs=2, on=loader.ON)
    per_1000 = 3 * 2e-3 * 1e6 / (row["tokens"] / 1000)
    assert row["us_per_1000_tokens"] == pytest.approx({"median": per_1000, "least": per_1000})
    assert row["percent_added"] == pytest.approx({"least": 25, "q25": 25, "median": 25, "q75": 25})
    text = loader.page({"rows": [row], "machine": loader.describe()})
    assert f"| 2 x 1,024 | {per_1000:.1f} | {1.25 * per_1000:.1f} | {per_1000 / 4:.1f} | 25.0 %" in text


def test_too_few_songs_are_refused(shards):
    with pytest.raises(UserError, match="has not enough songs for 1000 rows"):
        loader.measure(shards, 1024, 1000, batches=1, pairs=1, on=loader.ON)
