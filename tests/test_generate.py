import errno
import os
from dataclasses import asdict
from pathlib import Path

import mido
import pytest

from meloformer import generate as module
from meloformer.checkpoint.store import save_checkpoint
from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.tokens import vocab

from helpers.untrained import CONFIG, untrained


@pytest.mark.parametrize(
    "flag", ["--temperature=nan", "--temperature=-1", "--top_p=0", "--tempo=3", "--seed=-1"]
)
def test_numbers_out_of_range_end_in_one_line(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--checkpoint", "c", "--output", "x.mid", flag])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "text, expected",
    [("0, 33", (0, 33)), ("drums", (128,)), ("Flute,Grand Piano , flute", (0, 73))],
)
def test_instruments_by_number_and_name(text, expected):
    assert module.parse_instruments(text) == expected


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(
        tmp_path / "checkpoints",
        1,
        model_state=untrained().state_dict(),
        config=asdict(CONFIG),
        tokenizer_json=vocab.to_json(),
        optimizer_state=None,
        trainer={"identity": {"max_seq_len": 2048}},
        keep_last=1,
    )
    return tmp_path


def test_the_command_writes_a_song_and_its_picture(checkpoint, tmp_path, capsys):
    compose(3, bars=2).dump(tmp_path / "prompt.mid")
    args = "--bars 2 --max-tokens 300 --time_signature 3/4 --tempo 90 --instruments drums,0 --seed 5".split()
    files = ["--output", tmp_path / "new.mid", "--picture", tmp_path / "new.png"]
    module.main(["--checkpoint", str(checkpoint), *map(str, files), *args])
    assert any(m.type == "note_on" for track in mido.MidiFile(tmp_path / "new.mid").tracks for m in track)
    assert (tmp_path / "new.png").stat().st_size > 1000
    assert "2 new bars" in capsys.readouterr().out
    args = "--bars 1 --prompt_bars 1 --max_tokens 100".split()
    files = ["--output", tmp_path / "more.mid", "--prompt", tmp_path / "prompt.mid"]
    module.main(["--checkpoint", str(checkpoint), *map(str, files), *args])
    assert mido.MidiFile(tmp_path / "more.mid").tracks


@pytest.mark.parametrize(
    "args, says",
    [
        (["--time_signature", "4/5"], "--time_signature"),
        (["--instruments", "violine"], "did you mean violin"),
        (["--prompt_bars", "2"], "needs --prompt"),
        (["--picture", "roll.gif"], "end in .png"),
        (["--prompt", "none.mid"], "--prompt none.mid: unreadable: No such file"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--output", "no/such/folder/x.mid"], "no folder"),
        (["--output", ""], "--output : is a folder"),
        (["--max_tokens", "3"], "wrote no note in 3 tokens"),
    ],
)
def test_mistakes_are_named(checkpoint, tmp_path, args, says):
    start = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid")]
    with pytest.raises(UserError, match=says):
        module.main([*start, *args])
    assert not (tmp_path / "x.mid").exists()


@pytest.fixture
def no_work(monkeypatch):
    """Reading the prompt and loading the model must not be reached."""
    for name in ("read_prompt", "load_model"):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize(
    "name, says",
    [
        ("taken.png", "is a folder"),
        ("none/x.png", "there is no folder .*none"),
        ("file/x.png", "there is no folder .*file"),
        ("pipe.png", "not a regular file"),
        ("x" * 300 + ".png", "name too long"),
        ("x" * 248 + ".png", "name too long"),  # with what is added while it is written
        ("nul\0.png", "null byte"),
    ],
)
@pytest.mark.parametrize("flag", ["--output", "--picture"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, no_work, flag, name, says):
    folder = tmp_path / "here"
    (folder / "taken.png").mkdir(parents=True)
    (folder / "file").touch()
    os.mkfifo(folder / "pipe.png")
    before = sorted(folder.iterdir())
    places = {"--output": str(tmp_path / "x.mid")} | {flag: f"{folder}/{name}"}
    with pytest.raises(UserError, match=f"(?i)^{flag} .*{says}") as error:
        module.main(["--checkpoint", "c", *(word for place in places.items() for word in place)])
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before and not (tmp_path / "x.mid").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_folder_that_takes_no_file_is_told_before_the_work(tmp_path, no_work, monkeypatch, code):
    """As root no permission is missing: the answer of the system is made up."""

    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match=rf"^--output .*x\.mid.*\({os.strerror(code)}\)$"):
        module.main(["--checkpoint", "c", "--output", str(tmp_path / "x.mid")])
    assert not list(tmp_path.iterdir())


def test_a_device_is_not_replaced(no_work):
    with pytest.raises(UserError, match="--output /dev/full: exists and is not a regular file"):
        module.main(["--checkpoint", "c", "--output", "/dev/full"])


def test_the_picture_does_not_replace_the_song(tmp_path, no_work):
    (tmp_path / "link").symlink_to(tmp_path)
    paths = ["--output", str(tmp_path / "x.png"), "--picture", str(tmp_path / "link" / "x.png")]
    with pytest.raises(UserError, match="same file as --output"):
        module.main(["--checkpoint", "c", *paths])


def test_nothing_is_left_where_the_work_fails(tmp_path):
    paths = ["--output", str(tmp_path / "x.mid"), "--picture", str(tmp_path / "x.png")]
    with pytest.raises(UserError, match="nowhere"):
        module.main(["--checkpoint", "nowhere", *paths])
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_no_part_of_a_song(checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "songs" / "x.mid"
    target.parent.mkdir()

    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fill)
    with pytest.raises(UserError, match=r"cannot write .*x\.mid: No space left"):
        module.main(["--checkpoint", str(checkpoint), "--output", str(target), "--max_tokens", "400"])
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize(
    "data, reason", [(b"", "empty"), (b"no music", "not_midi"), (None, "unreadable")], ids=str
)
def test_an_unusable_prompt_is_named(checkpoint, tmp_path, data, reason):
    prompt = tmp_path / "my prompt.mid"
    prompt.write_bytes(data) if data is not None else prompt.mkdir()
    args = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--prompt", str(prompt)]
    with pytest.raises(UserError, match=rf"^--prompt .*my prompt\.mid: {reason}: "):
        module.main(args)
