"""Atomic writes, JSON, and locks."""

import os
import re
import sys
from pathlib import Path

import pytest

from meloformer import cli, export, preprocess, train
from meloformer.checkpoint import store
from meloformer.errors import UserError
from meloformer.files import (
    atomic_writer,
    check_can_write,
    exclusive_lock,
    parse_json,
    read_json,
    sha256_of_file,
    temporary_of,
    to_json,
    write_atomic,
    write_json,
)

from helpers.full_disk import full_disk

ROOT = Path(__file__).resolve().parents[1]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(RuntimeError), atomic_writer(path) as file:
        file.write(b"half of the new")
        assert path.read_bytes() == b"old" and temporary_of(path).exists()
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_writer(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    """The error of a failed write, unlike that of a failed open, does not have it."""
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left") as error:
        write_atomic(tmp_path / "file", b"new")
    assert error.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


def test_equal_values_are_equal_bytes(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": [2]})
    write_json(tmp_path / "b", {"y": [2], "x": 1})
    assert sha256_of_file(tmp_path / "a") == sha256_of_file(tmp_path / "b")
    assert read_json(tmp_path / "a") == {"x": 1, "y": [2]}


@pytest.mark.parametrize(
    "content, said",
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "is n"),  # parsed by some versions of Python
        (b'{"a": [' * 40 + b"]}" * 40, "is nested too deeply"),
        (b"[1]", "does not hold a JSON object"),
    ],
    ids=["cut", "endless", "deep", "nested", "list"],
)
def test_what_is_no_json_object_is_named(tmp_path, content, said):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=f"file.json: {said}"):
        read_json(tmp_path / "file.json")
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        read_json(tmp_path / "none.json")


def test_a_value_of_the_usual_depth_is_parsed():
    value = {"a": [{"b": [{"c": [1, 2.5, "[[[["]}]}], "d": []}
    assert parse_json(to_json(value)) == value


def test_no_other_module_parses_json():
    """Nothing else is safe from deep nesting; these parse what this program has just written itself."""
    own = {"meloformer/files.py", "meloformer/training/resume.py", "meloformer/training/distributed.py"}
    sources = [
        path for folder in ("meloformer", "benchmarks", "kernels") for path in (ROOT / folder).rglob("*.py")
    ]
    found = {
        str(path.relative_to(ROOT)) for path in sources if re.search(r"\bjson\.loads?\(", path.read_text())
    }
    assert found == own


@pytest.mark.parametrize("name", ["", "file"], ids=["a folder", "a file"])
def test_a_lock_is_held_by_one(tmp_path, name):
    path = tmp_path / name
    with exclusive_lock(path, "taken"):
        with pytest.raises(UserError, match="taken"), exclusive_lock(path, "taken"):
            pass
    with pytest.raises(BlockingIOError), exclusive_lock(path, "taken"):
        raise BlockingIOError  # trouble of the holder's own is not taken for another holder


@pytest.mark.parametrize(
    "command",
    [
        lambda folder: preprocess.main(["--input", str(folder), "--output", str(folder / "out")]),
        lambda folder: train.main(["--data_dir", str(folder)]),
    ],
    ids=["preprocess", "train"],
)
def test_a_platform_without_locks_is_refused_in_one_line(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows: importing it fails
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: command(tmp_path))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "this platform is not supported" in line
    assert not list(tmp_path.iterdir())


def test_files_are_written_as_windows_demands(tmp_path, monkeypatch):
    """It opens no folders and renames no open files."""
    real, replace = os.open, os.replace

    def windows_open(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError
        return real(path, *args, **kwargs)

    def windows_replace(old, new):
        assert file.closed
        replace(old, new)

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "replace", windows_replace)
    with atomic_writer(tmp_path / "file") as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_folder_is_checked_without_being_made(tmp_path, monkeypatch):
    check_can_write(tmp_path)
    check_can_write(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write to {folder}: {tmp_path / 'file'} is no folder"):
            check_can_write(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path / 'new'}: no permission in {tmp_path}"):
        check_can_write(tmp_path / "new")


def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.touch()
    monkeypatch.setattr(train, "Trainer", lambda *_: pytest.fail("built the model first"))
    with pytest.raises(UserError, match=f"cannot write to {taken}"):
        train.main(["--data_dir", str(tmp_path), "--output_dir", str(taken), "--device", "cpu"])
    monkeypatch.setattr(store, "load_checkpoint", lambda *_: pytest.fail("read the checkpoint first"))
    (tmp_path / "step-00000001").mkdir()
    for output, said in ((taken, "exists already"), (taken / "model", "cannot write to")):
        with pytest.raises(UserError, match=f"{taken}.*{said}|{said} {taken}"):
            export.main(["--checkpoint", str(tmp_path / "step-00000001"), "--output", str(output)])


def test_a_folder_that_no_name_can_have_is_refused():
    with pytest.raises(UserError, match="null character"):
        check_can_write(Path("a\0b"))
