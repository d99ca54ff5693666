"""Saves that fail, crash or are killed: what was there stays."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meloformer.checkpoint import store as checkpoint
from meloformer.checkpoint.store import (
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
)
from meloformer.errors import UserError

from helpers.checkpoints import assert_one_line, make_model, make_optimizer, save, steps_in


def test_a_failed_save_leaves_the_others_and_no_leftover(tmp_path, monkeypatch):
    path = save(tmp_path, 5, keep_last=1)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError) as error:
        save(tmp_path, 6, keep_last=1)
    assert_one_line(error, "No space left", str(tmp_path))
    assert steps_in(tmp_path) == [path.name]
    assert load_checkpoint(path).step == 5


def test_a_disk_too_full_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    path = save(tmp_path, 5, keep_last=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 << 20))
    monkeypatch.setattr(checkpoint, "save_file", None)
    with pytest.raises(UserError) as error:
        save(tmp_path, 6, keep_last=1)
    assert_one_line(error, "it needs 0.02 GB of disk, and 0.00 are free", str(tmp_path))
    assert latest_checkpoint(tmp_path) == path and steps_in(tmp_path) == [path.name]


class Crash(BaseException):
    """What no code catches, as the end of a process."""


@pytest.mark.parametrize("again", [False, True], ids=["next-step", "same-step"])
def test_a_crash_at_any_step_of_a_save_loses_nothing(tmp_path, monkeypatch, again):
    """Crashes before each operation on the disk, and in the middle of deleting a folder."""
    rmtree = shutil.rmtree
    crash_at, calls = 0, 0

    def crashing(operation):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == crash_at and operation is rmtree:
                next(Path(arguments[0]).iterdir()).unlink()
            if calls == crash_at:
                raise Crash
            return operation(*arguments, **options)

        return call

    while True:
        crash_at, calls, root = crash_at + 1, 0, tmp_path / str(crash_at)
        save(root, 4)
        save(root, 5)
        with monkeypatch.context() as patched:
            for name in ("rename", "mkdir", "write_bytes"):
                patched.setattr(Path, name, crashing(getattr(Path, name)))
            patched.setattr(shutil, "rmtree", crashing(rmtree))
            patched.setattr(checkpoint, "save_file", crashing(checkpoint.save_file))
            try:
                path = save(root, 5 if again else 6, keep_last=1)
                break
            except Crash:
                assert load_checkpoint(latest_checkpoint(root)).step >= 5
        assert save(root, 7, keep_last=1) and steps_in(root) == ["step-00000007"]
    assert crash_at > 8 and steps_in(root) == [path.name]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_file_reaches_the_disk_before_the_rename(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda *a: (events.append("rename"), rename(*a))[1])
    model = make_model()
    path = save(tmp_path, 1, model, make_optimizer(model))
    names = [Path(event).name for event in events]
    before, after = names[: names.index("rename")], names[names.index("rename") + 1 :]
    assert sorted(before[:-1]) == sorted(file.name for file in path.iterdir())
    assert before[-2] == "manifest.json" and before[-1].endswith("step-00000001")
    assert after == [tmp_path.name]


KILLS = """
import os, random, signal, sys, time
from dataclasses import asdict
import torch
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import vocab
from meloformer.checkpoint.store import latest_checkpoint, load_checkpoint, restore_optimizer, save_checkpoint

torch.set_num_threads(1)
root, kills, wanted_moments = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = ModelConfig(layers=1, dim=16, heads=1, ffn=16)
model = MeloFormer(config)
optimizer = torch.optim.AdamW(model.parameters())
sum(parameter.sum() for parameter in model.parameters()).backward()
optimizer.step()

def save(step):
    save_checkpoint(root, step, model_state=model.state_dict(), config=asdict(config),
        tokenizer_json=vocab.to_json(), optimizer_state=optimizer.state_dict(), trainer={"epoch": step},
        keep_last=1)

def incomplete():
    return [name for name in os.listdir(root) if name.startswith(".incomplete-")]

delays = random.Random(0)
started = time.monotonic()
save(0)
took = time.monotonic() - started
latest = moments = number = 0
while number < kills or moments < wanted_moments and number < 20 * kills:  # some kills miss the saves
    number += 1
    seen, begun, wanted = {*incomplete()}, 0, delays.randint(1, 3)
    child = os.fork()
    if child == 0:
        for step in range(latest, latest + 10_000):  # the first one replaces a checkpoint of its step
            save(step)
    while begun < wanted:
        now = {*incomplete()}
        begun, seen = begun + len(now - seen), now
        time.sleep(0.001)
    time.sleep(delays.random() * 1.5 * took)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "a save failed"
    moments += bool(incomplete())
    checkpoint = load_checkpoint(latest_checkpoint(root))
    assert checkpoint.step >= latest and checkpoint.trainer["epoch"] == checkpoint.step
    restore_optimizer(checkpoint.path, optimizer)
    latest = checkpoint.step
print(latest, moments)
"""


@pytest.mark.faults
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "60", "10"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    latest, cut_short = map(int, done.stdout.split())
    assert latest > 0 and cut_short >= 10, "the kills missed the saves"


@pytest.mark.parametrize("broken", [False, True])
def test_what_a_killed_save_had_replaced_does_not_stop_the_next(tmp_path, monkeypatch, broken):
    """Killed between its new checkpoint and the removal of the one before, of the same step."""
    good = save(tmp_path, 3)
    shutil.copytree(good, tmp_path / f"{good.name}.replaced")
    if broken:
        (good / "model.safetensors").write_bytes(b"")
    with monkeypatch.context() as patch:
        rename = Path.rename
        patch.setattr(Path, "rename", lambda path, to: rename(path, to) if to != good else _full())
        with pytest.raises(UserError, match="No space"):
            save(tmp_path, 3)
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 3
    save(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert load_checkpoint(good).step == 3


def _full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_best_checkpoint_stays_though_it_was_just_being_replaced(tmp_path):
    """Killed between the two renames, and trained on from there."""
    best = save(tmp_path, 3, val_loss=0.05)
    best.rename(tmp_path / f"{best.name}.replaced")
    newest = save(tmp_path, 4, val_loss=0.9, keep_last=1)
    assert {path.name for path in tmp_path.iterdir()} == {best.name, newest.name}
    assert best_checkpoint(tmp_path) == best


def test_a_checkpoint_that_was_moved_and_linked_can_be_replaced_and_removed(tmp_path):
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save(root, 3).rename(elsewhere)
    (root / "step-00000003").symlink_to(elsewhere)
    save(root, 3)
    save(root, 4, keep_last=1)
    assert [path.name for path in root.iterdir()] == ["step-00000004"]
    assert load_checkpoint(elsewhere).step == 3
