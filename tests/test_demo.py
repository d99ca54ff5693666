import os

import pytest

from meloformer import demo
from meloformer.errors import UserError

from helpers.full_disk import full_disk


def test_only_a_demos_own_folder_is_emptied(tmp_path):
    (tmp_path / "midi").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not the folder of a demo"):
        demo.main(["--output", str(tmp_path), "--overwrite"])
    assert (tmp_path / "thesis.txt").exists()

    folder = tmp_path / "demo"
    demo.prepare_folder(folder, overwrite=False)
    (folder / "run").mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="add --overwrite"):
        demo.prepare_folder(folder, overwrite=False)
    demo.prepare_folder(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [".meloformer-demo", "notes.txt"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        demo.main(["--output", str(tmp_path / "file")])


def test_a_full_disk_leaves_no_half_song(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"^.*real-song\.mid: No space left on device$"):
        demo.main(["--output", str(tmp_path)])
    assert not list((tmp_path / "midi").iterdir())


def test_a_step_is_printed_as_the_command_it_is(capsys):
    taken = []

    def main(words):
        taken.extend(words)

    main.__module__ = "meloformer.generate"
    demo.step("Title", main, {"bars": 4, "instruments": "drums, flute"})
    assert taken == ["--bars", "4", "--instruments", "drums, flute"]
    assert "$ python -m meloformer.generate --bars 4 --instruments 'drums, flute'" in capsys.readouterr().out
