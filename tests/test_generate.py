import json
import os
import signal
import sys
from types import SimpleNamespace

import miditoolkit
import mido
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from meloformer import generate as module
from meloformer import stop
from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.generation.device import loop as device_loop
from meloformer.midi.reader import read_midi
from meloformer.tokens import attributes, vocab
from meloformer.tokens.grammar import check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.full_disk import full_disk
from helpers.untrained import save_untrained


@pytest.mark.parametrize(
    "flag", ["--temperature=nan", "--temperature=-1", "--top_p=0", "--tempo=3", "--seed=-1"]
)
def test_numbers_out_of_range_end_in_one_line(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--checkpoint", "c", "--output", "x.mid", flag])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def checkpoint(tmp_path):
    save_untrained(tmp_path / "checkpoints", 2048)
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


def test_weights_of_8_bits_write_valid_songs_too(checkpoint, tmp_path):
    files = ["--output", str(tmp_path / "new.mid"), "--tokens", str(tmp_path / "new.json")]
    args = "--bars 2 --max_tokens 300 --seed 5 --device cpu --int8".split()
    module.main(["--checkpoint", str(checkpoint), *files, *args])
    check(np.array(json.loads((tmp_path / "new.json").read_text())["ids"]))
    assert read_midi(tmp_path / "new.mid").instruments


def test_weights_of_8_bits_are_refused_before_the_model_is_loaded(monkeypatch, tmp_path):
    args = ["--checkpoint", "c", "--output", str(tmp_path / "x.mid"), "--int8", "--device"]
    monkeypatch.setattr(module, "pick_device", torch.device)
    with pytest.raises(UserError, match="int8 weights are for the CPU"):
        module.main([*args, "cuda"])
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    with pytest.raises(UserError, match="has no products with int8 weights"):
        module.main([*args, "cpu"])


@pytest.mark.parametrize(
    "args, says",
    [
        (["--time_signature", "4/5"], "--time_signature"),
        (["--instruments", "violine"], "did you mean violin"),
        (["--prompt_bars", "2"], "needs --prompt"),
        (["--graphs", "--device", "cpu"], "needs a GPU"),
        (["--cache_dtype", "fp8", "--device", "cpu"], "--cache_dtype fp8: needs CUDA graphs"),
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
    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--max_tokens", "400"]
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
        module.main(["--checkpoint", str(checkpoint), *paths, "--max_tokens", "400"])
    assert "\n" not in str(error.value) and "x.mid: " in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["x.mid"] and mido.MidiFile(folder / "x.mid").tracks


def test_a_disk_that_fills_up_under_the_tokens_keeps_the_song(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "songs"
    folder.mkdir()
    paths = ["--output", str(folder / "x.mid"), "--tokens", str(folder / "x.json")]
    monkeypatch.setattr(module, "write_tokens", full_disk)
    with pytest.raises(UserError, match=r"^cannot write the tokens .*x\.json: No space left"):
        module.main(["--checkpoint", str(checkpoint), *paths, "--max_tokens", "400"])
    assert [path.name for path in folder.iterdir()] == ["x.mid"]


def test_a_progress_bar_that_cannot_be_shown_costs_no_song(checkpoint, tmp_path, monkeypatch):
    """stderr may be a file on a full disk."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", SimpleNamespace(write=full_disk, flush=full_disk))
        module.main(
            ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--max_tokens", "400"]
        )
    assert mido.MidiFile(tmp_path / "x.mid").tracks


@pytest.fixture
def stopped(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs the command, with a signal when a bar begins; gives exit code, path and output."""

    def run(signal_number, begun, *args):
        def write_then_signal(model, drafts, *others, **named):
            for number in whole(model, drafts, *others, **named):
                if drafts[number].new_bars == begun:
                    os.kill(os.getpid(), signal_number)
                yield number

        whole = module.write
        monkeypatch.setattr(stop, "_leave_terminal", lambda: None)  # it would silence the tests
        monkeypatch.setattr(module, "write", write_then_signal)
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


def notes_of(path) -> set[tuple]:
    return {
        (128 if track.is_drum else track.program, note.start, note.end, note.pitch, note.velocity)
        for track in read_midi(path).instruments
        for note in track.notes
    }


def test_several_songs_are_those_of_their_seeds(checkpoint, tmp_path, capsys):
    words = ["--checkpoint", str(checkpoint), "--max_tokens", "200", "--chords", "C"]
    module.main([*words, "--output", str(tmp_path / "x.mid"), "--num", "3", "--seed", "4"])
    assert capsys.readouterr().out.count(" new notes by ") == 3
    module.main([*words, "--output", str(tmp_path / "alone.mid"), "--seed", "5"])
    assert notes_of(tmp_path / "x-2.mid") == notes_of(tmp_path / "alone.mid")
    assert notes_of(tmp_path / "x-1.mid") != notes_of(tmp_path / "x-3.mid")


def test_none_of_several_songs_replaces_a_file(checkpoint, tmp_path):
    (tmp_path / "x-2.mid").write_bytes(b"old")
    with pytest.raises(UserError, match=r"--output 2 .*x-2\.mid exists"):
        module.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--num", "2"])
    assert [path.name for path in tmp_path.glob("*.mid")] == ["x-2.mid"]


def test_of_several_songs_those_with_notes_are_written(checkpoint, tmp_path):
    words = ["--checkpoint", str(checkpoint), "--max_tokens", "30", "--output", str(tmp_path / "x.mid")]
    with pytest.raises(UserError, match="of 12 songs: the model wrote no note"):
        module.main([*words, "--num", "12"])
    assert 0 < len(list(tmp_path.glob("x-*.mid"))) < 12


@pytest.fixture
def given(tmp_path):
    compose(3, bars=4).dump(tmp_path / "given.mid")
    return tmp_path / "given.mid"


def test_a_given_song_is_accompanied(checkpoint, tmp_path, given, capsys):
    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--given", str(given)]
    module.main([*words, "--add", "sax, choir", "--density", "sax 9, choir 9", "--chords", "C"])
    before, after = notes_of(given), notes_of(tmp_path / "x.mid")
    assert before < after and {note[0] for note in after - before} <= {65, 52}
    assert f"4 new bars, {len(after - before)} new notes by " in capsys.readouterr().out


def test_the_melody_of_a_given_song_can_be_kept(checkpoint, tmp_path, given, capsys):
    song = read_midi(given)
    end = max(note.end for track in song.instruments for note in track.notes)
    line = [miditoolkit.Note(90, 110 + beat % 3, 480 * beat, 480 * (beat + 1)) for beat in range(end // 480)]
    song.instruments.append(miditoolkit.Instrument(72, notes=line))
    song.dump(given)
    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--given", str(given)]
    module.main([*words, "--keep", "Melody, drums", "--add", "sax", "--density", "sax 9", "--chords", "C"])
    before, after = notes_of(given), notes_of(tmp_path / "x.mid")
    assert {note for note in before if note[0] in (72, 128)} == {note for note in after if note[0] != 65}
    assert "Piccolo plays the melody" in capsys.readouterr().err


@pytest.mark.parametrize("loop", [[], ["--graphs"]], ids=["host", "slots"])
def test_bars_of_a_given_song_are_replaced(checkpoint, tmp_path, given, loop, monkeypatch, capsys):
    monkeypatch.setattr(device_loop, "require_gpu", lambda device: None)  # the steps of slots run anywhere
    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--given", str(given)]
    band = sorted({note[0] for note in notes_of(given)})
    more = ["--temperature", "4", "--repetition_penalty", "1", *loop]
    module.main([*words, "--replace_bars", "2-3", "--instruments", str(band[0]), *more])
    assert "--graphs" not in capsys.readouterr().err
    before, after = notes_of(given), notes_of(tmp_path / "x.mid")
    assert {note for note in before if note[0] != band[0]} <= after
    assert {note[0] for note in before ^ after} == {band[0]}


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "--given needs --add"),
        (["--add", "sax", "--bars", "3"], "--bars does not go with --given"),
        (["--add", "saxx"], "--add: 'saxx'"),
        (["--replace_bars", "4-9"], "there are no bars 4 to 9 in a song of 4"),
        (["--replace_bars", "two"], "no range of bars"),
        (["--replace_bars", "2", "--instruments", "sitar"], "Sitar does not play in"),
        (["--add", "sax", "--keep", "sitar"], "--keep: Sitar does not play in"),
        (["--add", "sax", "--keep", "drums, melodie"], "--keep: 'melodie'"),
    ],
)
def test_what_cannot_be_done_to_a_given_song_is_told(tmp_path, given, args, says):
    words = ["--checkpoint", "none", "--output", str(tmp_path / "x.mid"), "--given", str(given)]
    with pytest.raises(UserError, match=says):
        module.main([*words, *args])


def test_a_song_without_a_melody_is_told(tmp_path):
    song = miditoolkit.MidiFile()
    song.instruments = [miditoolkit.Instrument(0, notes=[miditoolkit.Note(90, p, 0, 480) for p in (60, 64)])]
    song.dump(tmp_path / "chords.mid")
    words = [
        "--checkpoint",
        "none",
        "--output",
        str(tmp_path / "x.mid"),
        "--given",
        str(tmp_path / "chords.mid"),
    ]
    with pytest.raises(
        UserError, match=r"^--keep: no instrument of .*chords\.mid is a melody .* of Grand Piano$"
    ):
        module.main([*words, "--add", "sax", "--keep", "melody"])


def test_flags_of_a_given_song_need_one(tmp_path):
    with pytest.raises(UserError, match="need --given"):
        module.main(["--checkpoint", "none", "--output", str(tmp_path / "x.mid"), "--add", "sax"])


def test_bars_are_streamed_and_tokens_written(checkpoint, tmp_path, capsys):
    compose(3, bars=2).dump(tmp_path / "prompt.mid")
    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--stream", "--bars", "9"]
    words += [
        "--tokens",
        str(tmp_path / "x.json"),
        "--chords",
        "C",
        "--time_signature",
        "3/4",
        "--tempo",
        "90",
    ]
    module.main([*words, "--prompt", str(tmp_path / "prompt.mid"), "--temperature", "2"])
    said = capsys.readouterr()
    bars = [json.loads(line) for line in said.out.splitlines()]
    assert [bar["bar"] for bar in bars] == list(range(3, 12)) and "9 new bars" in said.err
    tokens = json.loads((tmp_path / "x.json").read_text())
    ids = np.array(tokens["ids"])
    assert tokens["tokens"] == [vocab.names()[token] for token in ids]
    scanned = attributes.scan_bars(ids)
    begins = np.append(0, (scanned.steps / 24 * 60 / scanned.bpm).cumsum())
    assert [bar["at"] for bar in bars] == pytest.approx(begins[2:-1].tolist())
    whole = HIDTokenizer().decode(ids)
    begin = scanned.steps[:2].sum() * 20
    expected = {
        (128 if track.is_drum else track.program, note.start, note.pitch)
        for track in whole.instruments
        for note in track.notes
        if note.start >= begin
    }
    assert expected == {
        (
            128 if note["program"] is None else note["program"],
            begin + i * 1440 + 480 * note["start"],
            note["pitch"],
        )
        for i, bar in enumerate(bars)
        for note in bar["notes"]
    }
    assert {(*bar["chords"], bar["time_signature"], bar["tempo"]) for bar in bars} == {("C:maj", "3/4", 90)}


def test_a_song_goes_on_where_nobody_reads_the_stream(checkpoint, tmp_path, monkeypatch, capsys):
    def closed(text):
        raise BrokenPipeError(32, "Broken pipe")

    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid"), "--max_tokens", "400"]
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", closed)
        module.main([*words, "--stream"])
    assert mido.MidiFile(tmp_path / "x.mid").tracks
    assert capsys.readouterr().err.count("the song is written all the same") == 1
