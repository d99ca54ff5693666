"""A run on damaged songs: they are named and left out, or the run ends before it begins."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from meloformer import train
from meloformer.checkpoint.store import latest_checkpoint, load_checkpoint
from meloformer.data.batches import PackedSongs
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.tokens import vocab
from meloformer.training.distributed import start_job
from meloformer.training.trainer import Trainer

from helpers.tiny_train import TINY, refuse_to_read
from helpers.training import arguments, assert_same_run, config, fault, forked, records, spec

SHORT = {"epochs": 1, "validate_every": 2}


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


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The output of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole")
    train.train(config(data, output, **SHORT), TINY)
    return output


def shrink(folder: Path) -> None:
    os.truncate(folder / "shard-00000.bin", 100)


def change(folder: Path) -> None:
    path = folder / "shard-00000.bin"
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(0, 0))  # as after a while: the clock of files may be coarse


def change_validation(folder: Path) -> None:
    damage(folder, "val", value=vocab.PAD)
    os.utime(folder / "shard-00000.bin", ns=(0, 0))


def run_until_unread(settings, when_asked: int, act) -> str:
    """Train, and `act` when the run asks for the n-th time whether to stop; returns what the run says."""
    asked = 0

    def stop_reason():
        nonlocal asked
        asked += 1
        if asked == when_asked:
            act()

    with pytest.raises(UserError) as refused:
        Trainer(settings, TINY, start_job("cpu"), stop_reason).run()
    return str(refused.value)


@pytest.mark.parametrize("act", [shrink, change, change_validation])
def test_songs_that_change_under_a_run_end_it_with_the_state_saved(data, folder, whole, tmp_path, act):
    settings = config(folder, tmp_path / "run", **SHORT)
    said = run_until_unread(settings, 2, lambda: act(folder))
    assert "shard-00000.bin: has b" in said and "the state is saved in" in said and "\n" not in said
    shutil.copy(data / "shard-00000.bin", folder)
    train.train(dataclasses.replace(settings, resume="auto"), TINY)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("readable", [2, 3], ids="after {} rows".format)
def test_a_step_that_lacks_songs_is_not_taken(data, whole, tmp_path, monkeypatch, readable):
    """Without the warning of the loader, which reads ahead: the next step has begun when it is noticed."""
    settings, batch, left = config(data, tmp_path / "run", **SHORT), PackedSongs.batch, readable

    def read(self, epoch, rows):
        nonlocal left
        if self.split == "train" and rows[0] < self.rows_per_epoch(epoch):
            left -= 1
            if left < 0:
                refuse_to_read(self.shards, 0)
        return batch(self, epoch, rows)

    with monkeypatch.context() as patched:
        patched.setattr(PackedSongs, "batch", read)
        patched.setattr(Trainer, "_wants_stop", lambda self: False)
        with pytest.raises(UserError, match="song 0 has been cut short; the state is saved in"):
            Trainer(settings, TINY, start_job("cpu")).run()
    saved = load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert saved.step == len(records(tmp_path / "run")) == readable // 2
    assert saved.trainer["guard"]["skipped"] == 0
    train.train(dataclasses.replace(settings, resume="auto"), TINY)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.faults
def test_what_one_process_cannot_read_stops_all(data, whole, tmp_path):
    args = [
        *arguments(data, gradient_accumulation_steps=1, **SHORT),
        "--output_dir",
        tmp_path / "run",
    ]
    told, resumed = forked(
        "runs", spec(2, *args, faults=[fault("unread", 2, rank=1)]), spec(2, *args, "--resume")
    )
    assert told["codes"] == [2, 2], told["output"]
    assert "has been cut short; the state is saved in" in told["output"]
    assert "another process could not read its songs; the state" in told["output"]
    assert "Traceback" not in told["output"]
    assert resumed["codes"] == [0, 0], resumed["output"]
    assert len(records(tmp_path / "run")) == len(records(whole))


@pytest.mark.faults
def test_processes_leave_out_the_same_songs(folder, tmp_path):
    songs = [damage(folder, "train", which) for which in range(2)]
    args = [*arguments(folder, gradient_accumulation_steps=1, max_steps=2), "--output_dir", tmp_path / "run"]
    (told,) = forked("runs", spec(2, *args))
    assert told["codes"] == [0, 0], told["output"]
    assert told["output"].count("left out: 2 damaged song(s)") == 1
    assert all(f"song {song} is no song" in told["output"] for song in songs)
