"""The preprocess command, end to end, on composed songs and the real one that miditoolkit installs."""

import contextlib
import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from miditoolkit.midi.utils import example_midi_file

from meloformer import cli, preprocess
from meloformer.composer.compose import compose
from meloformer.data import build, shards
from meloformer.data.inputs import find_files, in_order
from meloformer.data.shards import ShardSet
from meloformer.data.workers import Result
from meloformer.errors import UserError
from meloformer.files import exclusive_lock, read_json
from meloformer.tokens import vocab
from meloformer.tokens.tokenizer import HIDTokenizer

COMPOSED = 18
ODD_NAME = "tab\there, line\nthere, caf\udce9.mid"  # its last letter is not UTF-8 on disk


def dump(seed: int, path: Path, bars: int) -> None:
    compose(seed, bars=bars).dump(str(path))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """18 composed songs and a real one, a copy of each of two, and three files that are no songs."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "deep" / "er").mkdir(parents=True)
    for seed in range(COMPOSED):
        dump(seed, folder / f"song {seed:02d}.mid", bars=3 + seed % 4)
    shutil.copy(example_midi_file(), folder / "deep" / "real.MIDI")
    shutil.copy(folder / "song 03.mid", folder / "deep" / "er" / "copy.kar")
    shutil.copy(folder / "deep" / "real.MIDI", folder / "aaa.mid")
    (folder / "empty.mid").touch()
    (folder / "broken.mid").write_bytes(b"MThd but nothing that follows it")
    (folder / ODD_NAME).write_bytes(b"no MIDI at all")
    (folder / "notes.txt").write_text("not for us")
    return folder


FILES = COMPOSED + 3 + 3
KEPT = COMPOSED + 1


def command(corpus: Path, output: Path, *more: str, workers: int = 1) -> list[str]:
    return [
        *("--input", str(corpus), "--output", str(output), "--workers", str(workers)),
        *("--shard-size", "3", "--val-split", "0.3", *more),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def processed(corpus, tmp_path_factory) -> Path:
    """What the command makes of the corpus with real worker processes, never interrupted."""
    folder = tmp_path_factory.mktemp("processed") / "data"
    preprocess.main(command(corpus, folder, workers=1))
    return folder


@cache
def encoded(path: str):
    return build.encode_file(path)


@pytest.fixture
def in_process(monkeypatch):
    """Encode in this process, each file once: for tests of what happens around that."""

    def run_tasks(function, items, **_):
        for item in items:
            yield Result(item, encoded(item))

    monkeypatch.setattr(build, "run_tasks", run_tasks)


def test_songs_are_the_tokens_of_their_files(corpus, processed):
    songs = ShardSet(processed)
    there = {songs[i].tobytes() for i in range(len(songs))}
    assert len(there) == len(songs) == KEPT
    tokenizer = HIDTokenizer()
    for path in (corpus / "song 00.mid", corpus / "deep" / "real.MIDI"):
        assert tokenizer.encode(path).tobytes() in there
    for i in range(len(songs)):
        assert songs.bars[i] == np.count_nonzero(vocab.CHORD.mask(songs[i]))
    assert read_json(processed / shards.TOKENIZER) == json.loads(json.dumps(HIDTokenizer().to_json()))
    assert len(shards.verify(processed)) == KEPT


def test_first_of_equal_files_wins(corpus, processed):
    order = in_order(find_files(str(corpus)), 0, None)
    failures = {}
    for path in sorted(processed.glob("shard-*.json")):
        failures.update((path, reason) for path, reason, _ in json.loads(path.read_text())["failures"])
    pairs = (("song 03.mid", "deep/er/copy.kar"), ("aaa.mid", "deep/real.MIDI"))
    for pair in pairs:
        first, second = sorted((str(corpus / name) for name in pair), key=order.index)
        assert failures[second] == "duplicate"
        assert first not in failures
    assert len(failures) == FILES - KEPT


def test_failed_tsv_has_one_line_per_file(corpus, processed):
    lines = (processed / "failed.tsv").read_bytes().split(b"\n")
    assert lines[0] == b"path\treason\tdetail"
    assert lines[-1] == b""
    rows = [line.split(b"\t") for line in lines[1:-1]]
    assert [len(row) for row in rows] == [3] * (FILES - KEPT)
    escaped = os.fsencode(str(corpus)) + b"/tab\\there, line\\nthere, caf\xe9.mid"
    assert escaped in {row[0] for row in rows}
    assert {row[1].decode() for row in rows} <= set(build.ALL_REASONS)


def test_table(corpus, processed, capsys):
    preprocess.main(command(corpus, processed))
    out = capsys.readouterr().out
    assert "is finished already" in out
    numbers = {line[:24].strip(): line[24:37].strip() for line in out.splitlines()}
    assert (numbers["files"], numbers["kept"], numbers["dropped"]) == (
        str(FILES),
        str(KEPT),
        str(FILES - KEPT),
    )
    assert numbers["duplicate"] == "2"
    assert int(numbers["train songs"]) + int(numbers["val songs"]) == KEPT
    assert int(numbers["val songs"]) > 0


def test_number_of_workers_changes_no_byte(corpus, processed, tmp_path):
    preprocess.main(command(corpus, tmp_path / "data", workers=3))
    assert contents(tmp_path / "data") == contents(processed)


def test_list_file_gives_the_same_songs(corpus, processed, tmp_path, monkeypatch, in_process):
    """Names relative to the list, Windows line ends, a blank line, a byte order mark."""
    names = [os.path.relpath(path, corpus) for path in find_files(str(corpus))]
    names = [name for name in names if "\n" not in name]
    lines = b"\xef\xbb\xbf" + b"\r\n".join(os.fsencode(name) for name in names) + b"\r\n\r\n"
    (corpus / "list.txt").write_bytes(lines)
    monkeypatch.chdir(tmp_path)
    preprocess.main(command(corpus / "list.txt", tmp_path / "data"))
    a, b = ShardSet(processed), ShardSet(tmp_path / "data")
    assert {d.tobytes() for d in a.digests} == {d.tobytes() for d in b.digests}


def test_limit_takes_the_first_of_the_shuffled(corpus, tmp_path, in_process):
    preprocess.main(command(corpus, tmp_path / "data", "--limit", "7", "--seed", "5"))
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "data").glob("shard-*.json"))]
    assert [record["files"] for record in records] == [3, 3, 1]
    files = find_files(str(corpus))
    order = in_order(files, 5, None)
    assert order != files
    assert sorted(order) == files
    assert in_order(files, 5, 7) == order[:7]


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


class Crash(BaseException):
    """Stands for sudden death: no handler catches it."""


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


def finished_shards(folder: Path) -> dict[str, int]:
    """Time stamps of the files of all finished shards."""
    stamps = {}
    for record in folder.glob("shard-*.json"):
        for path in folder.glob(record.stem + ".*"):
            stamps[path.name] = path.stat().st_mtime_ns
    return stamps


def start(arguments: list[str], **options) -> subprocess.Popen:
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command_line = [sys.executable, "-m", "meloformer.preprocess", *arguments]
    return subprocess.Popen(command_line, env=environment, stdout=subprocess.DEVNULL, **options)


def wait_for_shards(folder: Path, count: int, process: subprocess.Popen) -> None:
    while len(list(folder.glob("shard-*.json"))) < count and process.poll() is None:
        time.sleep(0.002)


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
        shards.verify(folder)

    def die(*_):
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(build, "write_shards", die)
        preprocess.main(command(corpus, folder))
    with pytest.raises(UserError, match="preprocess has not finished"):
        ShardSet(folder)
    preprocess.main(command(corpus, folder))
    assert contents(folder) == contents(processed)


def fails(arguments: list[str], capsys) -> str:
    """The one line that the command says when it exits with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: preprocess.main(arguments))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    line = lines[-1]
    assert "error: " in line
    assert "Traceback" not in "".join(lines)
    return line


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
    shards.verify(folder)


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


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_flipped_bit_is_told_on_resume_and_mended_by_removing_the_record(
    corpus, processed, tmp_path, capsys, in_process, suffix
):
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    (folder / shards.MANIFEST).unlink()
    path = folder / f"shard-00001.{suffix}"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    assert f"{path.name}: its SHA-256" in fails(command(corpus, folder), capsys)
    (folder / "shard-00001.json").unlink()
    preprocess.main(command(corpus, folder))
    assert contents(folder) == contents(processed)


def change_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


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


def test_no_song_at_all(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.mid").touch()
    for _ in range(2):  # the second run resumes, and has to say the same
        line = fails(["--input", str(source), "--output", str(tmp_path / "out"), "--workers", "1"], capsys)
        assert "none of 3 files became a song (3 times" in line
    assert not (tmp_path / "out" / shards.MANIFEST).exists()
    assert len((tmp_path / "out" / "failed.tsv").read_text().splitlines()) == 4


BAD_ARGUMENTS = {
    "nothing": ([], "--input and --output are needed"),
    "no output": (["--input", "x"], "--input and --output are needed"),
    "no workers": (["--input", "x", "--output", "y", "--workers", "0"], "not at least 1"),
    "endless timeout": (["--input", "x", "--output", "y", "--timeout", "1" + "0" * 20], "--timeout"),
    "endless memory": (["--input", "x", "--output", "y", "--memory-mb", "9" * 14], "--memory-mb"),
    "negative seed": (["--input", "x", "--output", "y", "--seed", "-1"], "--seed"),
    "val_split 1": (["--input", "x", "--output", "y", "--val_split", "1"], "not below 1"),
    "no such input": (["--input", "nowhere", "--output", "y"], "No such file"),
    "verify and input": (["--input", "x", "--verify", "y"], "--verify goes without"),
    "verify nothing": (["--verify", "nowhere"], "nowhere: is not a folder"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case, capsys):
    arguments, message = BAD_ARGUMENTS[case]
    assert message in fails(arguments, capsys)


def test_full_disk_is_one_line(corpus, tmp_path, capsys, monkeypatch, in_process):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert "No space left" in fails(command(corpus, tmp_path / "data"), capsys)


def test_output_that_is_a_file(corpus, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file" in fails(command(corpus, tmp_path / "file"), capsys)


def test_verify_command(processed, tmp_path, capsys):
    preprocess.main(["--verify", str(processed)])
    assert f"{KEPT} songs" in capsys.readouterr().out
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    path = folder / "shard-00000.bin"
    path.write_bytes(bytes(len(path.read_bytes())))
    assert "SHA-256" in fails(["--verify", str(folder)], capsys)


def falsify(name: str, change):
    return lambda folder: change_json(folder / name, change)


def append(name: str, text: str):
    return lambda folder: (folder / name).write_text((folder / name).read_text("latin-1") + text, "latin-1")


MANIFEST, RUN = shards.MANIFEST, build.RUN
FALSIFIED = {
    "val_split": (falsify(MANIFEST, lambda m: m.update(val_split=0.9)), "val_split"),
    "songs": (falsify(MANIFEST, lambda m: m.update(songs=1)), "songs"),
    "no tokens": (falsify(MANIFEST, lambda m: m.pop("tokens")), "tokens"),
    "vocab_size": (falsify(MANIFEST, lambda m: m.update(vocab_size=1)), "vocab_size"),
    "first shard dropped": (falsify(MANIFEST, lambda m: m["shards"].pop(0)), "manifest.json"),
    "last shard dropped": (falsify(MANIFEST, lambda m: m["shards"].pop()), "shards"),
    "run of another val_split": (falsify(RUN, lambda run: run.update(val_split=0.9)), "run.json"),
    "junk after the run": (append(RUN, " "), "run.json"),
    "junk in the failures": (append(build.FAILED, "junk"), "failed.tsv"),
    "failures gone": (lambda folder: (folder / build.FAILED).unlink(), "failed.tsv"),
    "mends": (falsify("shard-00000.json", lambda r: r["mends"].update(x=1)), "records"),
}


@pytest.mark.parametrize("case", FALSIFIED)
def test_verify_compares_the_manifest_with_the_run(processed, tmp_path, capsys, case):
    damage, message = FALSIFIED[case]
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    damage(folder)
    assert message in fails(["--verify", str(folder)], capsys)


def test_verify_needs_a_sane_run(processed, tmp_path, capsys):
    """A manifest that lists the damaged run.json as it is."""
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    change_json(folder / RUN, lambda run: run.update(shard_size=0))
    change_json(folder / MANIFEST, lambda manifest: manifest.update(run=shards.file_entry(folder / RUN)))
    assert "run.json: is damaged" in fails(["--verify", str(folder)], capsys)


def test_workers_need_no_torch():
    code = "import sys, meloformer.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MAX_BYTES_PER_FILE = 500  # paths of 88 characters included


@pytest.mark.parametrize("length", [10, 1000])
def test_memory_per_file(tmp_path, monkeypatch, length):
    """The parent keeps of each file its path and a digest, and nothing that grows with the song."""

    def run_tasks(function, items, **_):
        for i, path in enumerate(items):
            ids = np.full(length, vocab.P.start, np.uint16)
            ids[:2] = i % 65536, i // 65536
            yield Result(path, (ids, 1, []))

    monkeypatch.setattr(build, "run_tasks", run_tasks)

    def peak(count):
        names = tmp_path / f"{count}.txt"
        with open(names, "w") as file:
            file.writelines(
                f"/collections/a-large-one/full/{i % 256:02x}/{i:050d}.mid\n" for i in range(count)
            )
        gc.collect()
        tracemalloc.start()
        build.preprocess(str(names), str(tmp_path / str(count)), num_workers=1, shard_size=500)
        bytes_at_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_at_peak

    peak(500)  # what is imported or cached at the first call is not of the files
    assert (peak(8000) - peak(2000)) / 6000 < MAX_BYTES_PER_FILE
