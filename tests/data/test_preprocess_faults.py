"""The preprocess command when it is killed, resumed, overwritten or finds damage."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from meloformer import preprocess
from meloformer.data import build, damage, shards
from meloformer.data.shards import ShardSet
from meloformer.data.workers import Result
from meloformer.errors import UserError
from meloformer.files import exclusive_lock

from helpers.preprocess_runs import (
    COMPOSED,
    KEPT,
    Crash,
    change_json,
    command,
    contents,
    encoded,
    fails,
    finished_shards,
    start,
    wait_for_shards,
)


def encode_or_misbehave(path: str):
    name = os.path.basename(path)
    if name == "song 01.mid":
        time.sleep(600)
    if name == "song 02.mid":
        os._exit(9)
    return build.encode_file(path)


def test_a_file_that_hangs_or_kills_costs_itself(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "encode_file", encode_or_misbehave)
    preprocess.main(command(corpus, tmp_path / "data", "--timeout", "5", workers=2))
    assert len(ShardSet(tmp_path / "data")) == KEPT - 2
    rows = (tmp_path / "data" / "failed.tsv").read_text(errors="surrogateescape").splitlines()
    reasons = {os.path.basename(row.split("\t")[0]): row.split("\t")[1] for row in rows}
    assert (reasons["song 01.mid"], reasons["song 02.mid"]) == ("timeout", "crashed")


def test_death_at_any_step_of_writing(corpus, processed, tmp_path, monkeypatch, in_process, capsys):
    """Die before every fsync, rename and removal in turn, then run again: the same bytes each time."""
    expected = contents(processed)
    steps_left = 0

    def fragile(function):
        def call(*args, **kwargs):
            nonlocal steps_left
            steps_left -= 1
            if steps_left == 0:
                raise Crash
            return function(*args, **kwargs)

        return call

    crashes = 0
    for step in range(1, 1000):
        folder = tmp_path / str(step)
        with monkeypatch.context() as patched:
            for name in ("fsync", "replace", "unlink"):
                patched.setattr(os, name, fragile(getattr(os, name)))
            steps_left = step
            with contextlib.suppress(Crash):
                preprocess.main(command(corpus, folder))
            crashed = steps_left <= 0
        if not crashed:
            break
        crashes += 1
        preprocess.main(command(corpus, folder))
        assert contents(folder) == expected, f"died at step {step}"
        shutil.rmtree(folder)
    assert crashes > 50


def test_sigkill_of_the_real_command(corpus, tmp_path, in_process):
    """Kill the command again and again, at any time or shortly after it finished another shard."""
    folder, dice = tmp_path / "data", random.Random(0)
    arguments = command(corpus, folder, "--shard-size", "1", workers=2)
    kills, before = 0, {}
    for target in (0, 1, 4, 8, 12):
        # It comes after this process, which so kills it in time however busy the machine is.
        process = start(arguments, stderr=subprocess.DEVNULL, preexec_fn=lambda: os.nice(10))
        wait_for_shards(folder, target, process)
        time.sleep(dice.uniform(0, 0.03 if target else 0.5))
        process.kill()
        kills += process.wait() < 0
        after = finished_shards(folder) if folder.exists() else {}
        assert before.items() <= after.items(), "a finished shard was written again"
        before = after
    assert kills >= 3
    assert start(arguments).wait() == 0
    assert before.items() <= finished_shards(folder).items()
    preprocess.main(command(corpus, tmp_path / "uninterrupted", "--shard-size", "1"))
    assert contents(folder) == contents(tmp_path / "uninterrupted")


def test_ctrl_c_is_quiet_and_leaves_nothing_running(corpus, tmp_path):
    """SIGINT to the whole process group, as a terminal sends it, while the workers are busy."""
    names = [str(corpus / f"song {seed:02d}.mid") for seed in range(COMPOSED)]
    (tmp_path / "list.txt").write_text("\n".join(names * 90))
    folder = tmp_path / "data"
    process = start(
        command(tmp_path / "list.txt", folder, workers=2),
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell has its background jobs ignore it, and what they start: the tests, if they run there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_shards(folder, 1, process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()  # stderr closes when the last worker has left
    assert process.returncode == 130
    assert b"interrupted" in said
    assert b"Traceback" not in said


def test_a_stale_manifest_does_not_outlive_its_shards(corpus, processed, tmp_path, in_process, monkeypatch):
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    (folder / "shard-00004.json").unlink()
    with pytest.raises(UserError):
        damage.verify(folder)

    def die(*_):
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(build, "write_shards", die)
        preprocess.main(command(corpus, folder))
    with pytest.raises(UserError, match="preprocess has not finished"):
        ShardSet(folder)
    preprocess.main(command(corpus, folder))
    assert contents(folder) == contents(processed)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "1"],
        ["--shard-size", "4"],
        ["--limit", "3"],
        ["--val-split", "0.2"],
        ["--timeout", "9"],
        ["--sustain"],
    ],
    ids=" ".join,
)
def test_another_run_in_the_same_folder_is_refused(corpus, processed, arguments, capsys):
    before = contents(processed)
    line = fails(command(corpus, processed, *arguments), capsys)
    assert "another run" in line
    assert arguments[0].removeprefix("--").replace("-", "_") in line
    assert "--overwrite" in line
    assert contents(processed) == before


def test_overwrite(corpus, processed, tmp_path, in_process):
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    (folder / "mine.txt").write_text("stays")
    preprocess.main(command(corpus, folder, "--limit", "5", "--overwrite"))
    assert len(list(folder.glob("shard-*.bin"))) == 2
    assert (folder / "mine.txt").read_text() == "stays"
    damage.verify(folder)


def test_overwrite_killed_at_any_step(corpus, processed, tmp_path, monkeypatch, in_process, capsys):
    """What it was deleting is never resumed; what it wrote anew is, by the command without the flag."""
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    deletions, unlink = 3, Path.unlink

    def die_later(path, **options):
        nonlocal deletions
        deletions -= 1
        if deletions == 0:
            raise Crash
        unlink(path, **options)

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(Path, "unlink", die_later)
        preprocess.main(command(corpus, folder, "--overwrite"))
    assert len(list(folder.glob("shard-*.json"))) >= 7
    assert "unknown run" in fails(command(corpus, folder), capsys)

    def die_at_song_01(path):
        if path.endswith("song 01.mid"):
            raise Crash
        return encoded(path)

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(
            build,
            "run_tasks",
            lambda _, items, **__: (Result(item, die_at_song_01(item)) for item in items),
        )
        preprocess.main(command(corpus, folder, "--overwrite"))
    stamps = finished_shards(folder)
    assert stamps
    preprocess.main(command(corpus, folder))
    assert stamps.items() <= finished_shards(folder).items()
    assert contents(folder) == contents(processed)


def test_shards_of_unknown_origin_are_kept(corpus, processed, tmp_path, capsys):
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    (folder / build.RUN).unlink()
    assert "unknown run" in fails(command(corpus, folder), capsys)
    assert (folder / "shard-00000.bin").exists()


def test_one_run_at_a_time(corpus, tmp_path, capsys):
    with exclusive_lock(tmp_path, "taken"):
        assert "another preprocess" in fails(command(corpus, tmp_path), capsys)


def test_the_same_names_elsewhere_are_another_run(corpus, processed, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for folder in (corpus, other):
        (folder / "names.txt").write_text("song 00.mid\n")
    shutil.copy(corpus / "song 01.mid", other / "song 00.mid")
    arguments = command(Path("names.txt"), tmp_path / "data")
    monkeypatch.chdir(corpus)
    preprocess.main(arguments)
    monkeypatch.chdir(other)
    assert "another run (input differ)" in fails(arguments, capsys)
    monkeypatch.chdir(tmp_path)
    preprocess.main(command(corpus / "names.txt", tmp_path / "data"))
    assert "finished already" in capsys.readouterr().out


def test_damaged_shard_is_told_on_resume(corpus, processed, tmp_path, capsys):
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    (folder / "shard-00001.bin").write_bytes(b"")
    assert "shard-00001.bin" in fails(command(corpus, folder), capsys)


def flipped(data: bytes) -> bytes:
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


@pytest.mark.parametrize("name", ["failed.tsv", "tokenizer.json", "manifest.json", "division.bin"])
@pytest.mark.parametrize("damage", [None, flipped, lambda data: data[:9]], ids=["gone", "flipped", "short"])
def test_a_folder_is_finished_only_with_all_its_files(
    corpus, processed, tmp_path, capsys, in_process, name, damage
):
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage(data))
    preprocess.main(command(corpus, folder))
    said = capsys.readouterr().out
    assert "finished already" not in said
    assert f"{name}: " in said or (name == "manifest.json" and damage is None)
    assert contents(folder) == contents(processed)
    preprocess.main(command(corpus, folder))
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_flipped_bit_is_told_on_resume_and_mended_by_removing_the_record(
    corpus, processed, tmp_path, capsys, in_process, suffix
):
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    (folder / shards.MANIFEST).unlink()
    path = folder / f"shard-00001.{suffix}"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    said = fails(command(corpus, folder), capsys)
    assert f"{path.name}: its SHA-256" in said and f"delete {folder / 'shard-00001.json'}" in said
    (folder / "shard-00001.json").unlink()
    preprocess.main(command(corpus, folder))
    assert contents(folder) == contents(processed)


RECORD_DAMAGE = {
    "no files": lambda record: record.pop("files"),
    "files a text": lambda record: record.update(files="3"),
    "another count": lambda record: record.update(files=4),
    "no failures": lambda record: record.pop("failures"),
    "odd failures": lambda record: record.update(failures=[None]),
    "odd reasons": lambda record: record.update(dropped={"x": 1}),
    "odd mends": lambda record: record.update(mends={"x": "y"}),
    "no songs": lambda record: record["shard"].pop("songs"),
    "tokens a text": lambda record: record["shard"].update(tokens="1"),
    "no shard": lambda record: record.update(shard=[]),
}


@pytest.mark.parametrize("case", RECORD_DAMAGE)
def test_damaged_record_is_told_on_resume(corpus, processed, tmp_path, capsys, case):
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    (folder / shards.MANIFEST).unlink()
    change_json(folder / "shard-00001.json", RECORD_DAMAGE[case])
    assert "shard-00001.json: " in fails(command(corpus, folder), capsys)


def test_full_disk_is_one_line(corpus, tmp_path, capsys, monkeypatch, in_process):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert "No space left" in fails(command(corpus, tmp_path / "data"), capsys)
