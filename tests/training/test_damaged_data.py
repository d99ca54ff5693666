"""A run on damaged songs: they are named and left out, or the run ends before it begins."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from meloformer import train
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.tokens import vocab

from helpers.tiny_train import TINY
from helpers.training import config


@pytest.fixture
def folder(data, tmp_path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "shards"))


def damage(folder: Path, split: str, which: int = 0, value: int = 65535) -> int:
    """Overwrite a token of a song of a split; returns the number of the song."""
    songs = ShardSet(folder)
    song = int(songs.split(split)[which])
    with open(folder / "shard-00000.bin", "r+b") as file:
        file.seek(2 * (int(songs._offsets[0][song]) + 9))
        file.write(np.array([value], "<u2").tobytes())
    return song


def test_damaged_songs_are_named_left_out_and_counted(folder, tmp_path, capsys):
    songs = [damage(folder, "train"), damage(folder, "train", 1, vocab.PAD), damage(folder, "val")]
    train.train(config(folder, tmp_path / "run", max_steps=2), TINY)
    said = capsys.readouterr().out
    for song in songs:
        assert f"shard-00000.bin: song {song} is no song: token 9: " in said
    assert "left out: 3 damaged song(s)" in said
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    whole = ShardSet(folder)
    assert told["damaged_songs"] == 3
    assert told["training"]["songs"] == len(whole.split("train")) - 2
    assert told["validation"]["songs"] == len(whole.split("val")) - 1


def test_a_strict_run_ends_before_it_begins(folder, tmp_path):
    song = damage(folder, "val")
    with pytest.raises(UserError, match=rf"--strict_data: 1 damaged .*shard-00000\.bin: song {song} is no"):
        train.train(config(folder, tmp_path / "run", strict_data=True), TINY)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_rows(folder, tmp_path):
    train.train(config(folder, tmp_path / "run", max_steps=1), TINY)
    damage(folder, "train")
    with pytest.raises(UserError, match=r"data was .* damaged since"):
        train.train(config(folder, tmp_path / "run", max_steps=1, resume="auto"), TINY)
