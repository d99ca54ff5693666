import os
import signal
import sys
from dataclasses import asdict
from types import SimpleNamespace

import mido
import pytest
from matplotlib.figure import Figure

from meloformer import generate as module
from meloformer import stop
from meloformer.checkpoint.store import save_checkpoint
from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.tokens import attributes, vocab
from meloformer.tokens.grammar import check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.full_disk import full_disk
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


def test_a_song_is_replaced_where_it_may_be(checkpoint, tmp_path):
    (tmp_path / "x.mid").write_bytes(b"old")
    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--max_tokens", "60"]
    module.main([*words, "--overwrite"])
    assert mido.MidiFile(tmp_path / "x.mid").tracks


def test_nothing_is_left_where_the_work_fails(tmp_path):
    paths = ["--output", str(tmp_path / "x.mid"), "--picture", str(tmp_path / "x.png")]
    with pytest.raises(UserError, match="nowhere"):
        module.main(["--checkpoint", "nowhere", *paths])
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_under_the_picture_keeps_the_song(checkpoint, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "songs"
    folder.mkdir()
    paths = ["--output", str(folder / "x.mid"), "--picture", str(folder / "x.png")]
    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(UserError, match=r"^cannot write the picture .*x\.png: No space left") as error:
        module.main(["--checkpoint", str(checkpoint), *paths, "--max_tokens", "60"])
    assert "\n" not in str(error.value) and "x.mid: " in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["x.mid"] and mido.MidiFile(folder / "x.mid").tracks


def test_a_progress_bar_that_cannot_be_shown_costs_no_song(checkpoint, tmp_path, monkeypatch):
    """stderr may be a file on a full disk."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", SimpleNamespace(write=full_disk, flush=full_disk))
        module.main(
            ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--max_tokens", "60"]
        )
    assert mido.MidiFile(tmp_path / "x.mid").tracks


@pytest.fixture
def stopped(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs the command, with a signal when a bar begins; gives exit code, path and output."""

    def run(number, begun, *args):
        def generate(*positional, on_token, **named):
            def then_signal(tokens, bars):
                on_token(tokens, bars)
                if bars == begun:
                    os.kill(os.getpid(), number)

            return whole(*positional, on_token=then_signal, **named)

        whole = module.generate
        monkeypatch.setattr(stop, "_leave_terminal", lambda: None)  # it would silence the tests
        monkeypatch.setattr(module, "generate", generate)
        path = tmp_path / "x.mid"
        words = ["--checkpoint", str(checkpoint), "--output", str(path), "--temperature", "3", *args]
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored under nohup
        try:
            code = module.main(words)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        finally:
            signal.signal(signal.SIGHUP, before)
        return code, path, capsys.readouterr()

    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_keeps_the_complete_bars(stopped, tmp_path, number):
    compose(3, bars=2).dump(tmp_path / "prompt.mid")
    picture = tmp_path / "x.png"
    args = ["--prompt", str(tmp_path / "prompt.mid"), "--bars", "9", "--picture", str(picture)]
    code, path, said = stopped(number, 4, *args)
    assert code == 75
    ids = HIDTokenizer().encode(path)
    check(ids)
    assert len(attributes.cut_points(ids)) <= 2 + 3  # trailing rests are not written to MIDI files
    assert f"{path}: 3 new bars, " in said.out
    assert f"stopped by {number.name}: kept 3 of the 9 bars, all that were complete" in said.out
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_that_comes_too_early_says_that_nothing_is_kept(stopped, number):
    code, path, said = stopped(number, 1, "--bars", "9")
    assert code == 75 and not path.exists()
    assert (
        f"stopped by {number.name} before a bar with notes was complete, so {path} is not written" in said.out
    )


def test_a_disk_that_fills_up_leaves_no_part_of_a_song(checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "songs" / "x.mid"
    target.parent.mkdir()
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*x\.mid: No space left.* The song is lost"):
        module.main(["--checkpoint", str(checkpoint), "--output", str(target), "--max_tokens", "60"])
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
