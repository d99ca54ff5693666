"""Runs of the preprocess command: input songs, output folders, and the error line of a failed run."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from miditoolkit.midi.utils import example_midi_file

from meloformer import cli, preprocess
from meloformer.composer.compose import compose
from meloformer.data import build
from meloformer.data.workers import Result

COMPOSED = 18
ODD_NAME = "tab\there, line\nthere, caf\udce9.mid"  # its last letter is not UTF-8 on disk


def dump(seed: int, path: Path, bars: int) -> None:
    compose(seed, bars=bars).dump(str(path))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """18 composed songs and a real one, copies of two of these, and three files that are not songs."""
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
    """The output folder of the corpus, made with a real worker process and without interruption."""
    folder = tmp_path_factory.mktemp("processed") / "data"
    preprocess.main(command(corpus, folder, workers=1))
    return folder


@cache
def encoded(path: str):
    return build.encode_file(path)


@pytest.fixture
def in_process(monkeypatch):
    """Encode in this process, each file once, for tests of everything but the worker processes."""

    def run_tasks(function, items, **_):
        for item in items:
            yield Result(item, encoded(item))

    monkeypatch.setattr(build, "run_tasks", run_tasks)


class Crash(BaseException):
    """Simulates sudden death: no exception handler catches it."""


def finished_shards(folder: Path) -> dict[str, int]:
    """Modification times (ns) of the files of all finished shards, by file name."""
    stamps = {}
    for record in folder.glob("shard-*.json"):
        for path in folder.glob(record.stem + ".*"):
            stamps[path.name] = path.stat().st_mtime_ns
    return stamps


def start(arguments: list[str], **options) -> subprocess.Popen:
    """Start the command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command_line = [sys.executable, "-m", "meloformer.preprocess", *arguments]
    return subprocess.Popen(command_line, env=environment, stdout=subprocess.DEVNULL, **options)


def wait_for_shards(folder: Path, count: int, process: subprocess.Popen) -> None:
    while len(list(folder.glob("shard-*.json"))) < count and process.poll() is None:
        time.sleep(0.002)


def fails(arguments: list[str], capsys) -> str:
    """The error line of the command, which must exit with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: preprocess.main(arguments))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    line = lines[-1]
    assert "error: " in line
    assert "Traceback" not in "".join(lines)
    return line


def change_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
