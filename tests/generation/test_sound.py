"""Songs as audio, by stand-ins for synthesizers, which tests do not require, and what is said without one."""

import dataclasses
import io
import json
import os
import pwd
import stat
import sys
import wave
from importlib.util import find_spec

import miditoolkit
import mido
import numpy as np
import pytest

from meloformer import generate as module
from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.generation import sound
from meloformer.generation.generator import Song
from meloformer.generation.sound import FADE_SECONDS, PEAK, Synthesizer
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.full_disk import full_disk
from helpers.untrained import save_untrained

# As loud as midirenderer is, for as long as the MIDI file lasts; silent if nothing plays.
MIDIRENDERER = """
import io, wave
import mido
def render_wave_from(soundfont, midi):
    if b"damaged" in soundfont:
        raise RuntimeError("SoundFont error")
    song = mido.MidiFile(file=io.BytesIO(midi))
    loud = any(message.type == "note_on" for message in song)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((2, 2, 48000, 0, "NONE", ""))
        file.writeframes((b"\\x00\\x08" if loud else bytes(2)) * 2 * int(48000 * song.length))
    return buffer.getvalue()
"""
FLUIDSYNTH = """#!{python}
import os, sys, wave
assert os.getsid(0) == os.getpid()  # in a session of its own: the Ctrl-C that ends a song does not reach it
words = sys.argv[1:]
rate, target, soundfont, song = words[words.index("-r") + 1], words[words.index("-F") + 1], *words[-2:]
assert open(song, "rb").read(4) == b"MThd"
if b"damaged" in open(soundfont, "rb").read():
    print("fluidsynth: error: Failed to load the SoundFont " + soundfont, file=sys.stderr)
with wave.open(target, "wb") as file:
    file.setparams((2, 2, int(rate), 0, "NONE", ""))
    file.writeframes(b"\\x00\\x01" * 2 * 44100 * 20)
"""
SF2 = b"RIFF\x00\x00\x00\x00sfbkLIST\x00\x00\x00\x00INFOifil\x04\x00\x00\x00\x02\x00\x04\x00"
SF3 = SF2.replace(b"\x02\x00\x04", b"\x03\x00\x00")


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without synthesizers and SoundFonts; returns the folder where it looks for the latter."""
    fonts, programs, modules = (tmp_path / name for name in ("fonts", "bin", "modules"))
    for folder in (fonts, programs, modules):
        folder.mkdir()
    monkeypatch.setattr(sound, "FOLDERS", (str(tmp_path / "none"), str(fonts)))
    monkeypatch.setattr(
        sound, "find_spec", lambda name: find_spec(name) if (modules / f"{name}.py").exists() else None
    )
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("SOUNDFONT", raising=False)
    monkeypatch.syspath_prepend(modules)
    monkeypatch.delitem(sys.modules, "midirenderer", raising=False)
    yield fonts
    sys.modules.pop("midirenderer", None)


@pytest.fixture
def midirenderer(bare, tmp_path):
    (tmp_path / "modules" / "midirenderer.py").write_text(MIDIRENDERER)


@pytest.fixture
def fluidsynth(bare, tmp_path):
    program = tmp_path / "bin" / "fluidsynth"
    program.write_text(FLUIDSYNTH.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def no_work(monkeypatch):
    """Reading the prompt and loading the model must not be reached."""
    for name in ("read_prompt", "load_model"):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


def refusal(tmp_path, *words) -> str:
    """What the command says to --wav, before it does anything."""
    before = sorted(tmp_path.rglob("*.*"))
    with pytest.raises(UserError) as error:
        module.main(
            [
                "--checkpoint",
                "c",
                "--output",
                str(tmp_path / "x.mid"),
                "--wav",
                str(tmp_path / "x.wav"),
                *words,
            ]
        )
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert [path for path in sorted(tmp_path.rglob("*.*")) if "pycache" not in str(path)] == before
    return str(error.value)


def test_without_a_synthesizer_a_line_says_how_to_get_one(bare, tmp_path, no_work):
    (bare / "a.sf2").write_bytes(SF2)
    assert refusal(tmp_path) == sound.NO_RENDERER and "pip install midirenderer" in sound.NO_RENDERER


def test_without_a_soundfont_a_line_says_how_to_get_one(bare, midirenderer, tmp_path, no_work):
    (bare / "a.sf2").write_text("no SoundFont, whatever its name")
    (bare / "folder.sf2").mkdir()
    assert refusal(tmp_path) == sound.NO_SOUNDFONT and "timgm6mb-soundfont" in sound.NO_SOUNDFONT


@pytest.mark.parametrize("content", [None, b"", b"MThd", SF2[:10]], ids=["none", "empty", "MIDI", "cut"])
def test_what_is_no_soundfont_is_named(bare, midirenderer, tmp_path, no_work, monkeypatch, content):
    font = tmp_path / "my.sf2"
    if content is not None:
        font.write_bytes(content)
    (bare / "good.sf2").write_bytes(SF2)
    assert refusal(tmp_path, "--soundfont", str(font)).startswith(f"--soundfont {font}: is no SoundFont")
    monkeypatch.setenv("SOUNDFONT", str(font))
    assert refusal(tmp_path).startswith(f"SOUNDFONT={font}: is no SoundFont")


@pytest.mark.parametrize("renderer", ["midirenderer", "fluidsynth"])
def test_a_damaged_soundfont_is_noticed_before_the_work(bare, request, renderer, tmp_path, no_work):
    request.getfixturevalue(renderer)
    (tmp_path / "my.sf2").write_bytes(SF2 + b"damaged")
    said = refusal(tmp_path, "--soundfont", str(tmp_path / "my.sf2"))
    assert said.startswith(f"{renderer} cannot render") and "my.sf2: " in said and "rror" in said


def test_a_compressed_soundfont_needs_a_synthesizer_that_reads_it(
    bare, midirenderer, tmp_path, no_work, request
):
    (bare / "my.sf3").write_bytes(SF3)
    said = refusal(tmp_path, "--soundfont", str(bare / "my.sf3"))
    assert "my.sf3: its samples are compressed" in said and "fluidsynth" in said
    assert refusal(tmp_path) == sound.NO_SOUNDFONT
    request.getfixturevalue("fluidsynth")
    assert Synthesizer.find().renderer.name == "fluidsynth"
    (bare / "my.sf2").write_bytes(SF2)
    assert Synthesizer.find().renderer.name == "midirenderer"


def test_whole_sets_of_instruments_are_preferred(bare, midirenderer, monkeypatch):
    for name in ("a.sf2", "TimGM6mb.sf2", "FluidR3_GM.sf2"):
        (bare / name).write_bytes(SF2)
    assert Synthesizer.find().soundfont.name == "FluidR3_GM.sf2"
    monkeypatch.setenv("SOUNDFONT", str(bare / "a.sf2"))
    assert Synthesizer.find().soundfont.name == "a.sf2"
    assert Synthesizer.find(bare / "TimGM6mb.sf2").soundfont.name == "TimGM6mb.sf2"


def test_a_user_without_a_home_has_the_other_folders(bare, midirenderer, monkeypatch):
    """As in a container that runs by a number which no user has."""
    (bare / "a.sf2").write_bytes(SF2)
    monkeypatch.setattr(sound, "FOLDERS", ("~/sounds", str(bare)))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    assert Synthesizer.find().soundfont == bare / "a.sf2"


def read(path) -> tuple[wave._wave_params, np.ndarray]:
    with wave.open(str(path)) as file:
        return file.getparams(), np.frombuffer(file.readframes(file.getnframes()), "<i2")


@pytest.mark.parametrize("tempo", [60, 150])
@pytest.mark.parametrize("renderer, rate", [("midirenderer", 48000), ("fluidsynth", 44100)])
def test_the_audio_is_as_long_as_the_song_and_as_loud_as_it_may_be(
    bare, request, tmp_path, renderer, rate, tempo
):
    request.getfixturevalue(renderer)
    (bare / "a.sf2").write_bytes(SF2)
    song = compose(3, bars=2, signature=(4, 4), tempo=tempo)
    Synthesizer.find().write_wav(song, tmp_path / "x.wav")
    params, samples = read(tmp_path / "x.wav")
    assert params[:3] == (2, 2, rate)
    end = max(note.end for track in song.instruments for note in track.notes)
    seconds = end / song.ticks_per_beat * 60 / tempo
    assert params.nframes / rate == pytest.approx(seconds + FADE_SECONDS, abs=0.01)
    assert samples.max() == round(PEAK * 32767)
    assert not any(marker.text == "" for marker in song.markers)  # the fade is not the song's


def test_a_song_of_the_generator_is_written_with_the_soundfont_named(bare, midirenderer, tmp_path):
    (tmp_path / "my.sf2").write_bytes(SF2)
    song = Song(HIDTokenizer().encode(compose(3, bars=2)), seed=0)
    song.save_wav(tmp_path / "x.wav", tmp_path / "my.sf2")
    assert read(tmp_path / "x.wav")[1].any()
    with pytest.raises(UserError, match="needs a SoundFont"):
        song.save_wav(tmp_path / "y.wav")


def test_silence_stays_silent(bare, midirenderer, tmp_path):
    (bare / "a.sf2").write_bytes(SF2)
    Synthesizer.find().write_wav(miditoolkit.MidiFile(), tmp_path / "x.wav")
    assert not read(tmp_path / "x.wav")[1].any()


def test_a_song_of_many_hours_is_refused_in_a_line(bare, midirenderer, tmp_path):
    (bare / "a.sf2").write_bytes(SF2)
    song = compose(3, bars=2)
    song.tempo_changes = [miditoolkit.TempoChange(120, 0), miditoolkit.TempoChange(4, 480)]
    song.instruments[0].notes[-1].end = 480 * 1000
    with pytest.raises(UserError, match=r"a song of 4\.2 hours is too long"):
        Synthesizer.find().write_wav(song, tmp_path / "x.wav")
    assert not (tmp_path / "x.wav").exists()


def test_what_a_given_song_has_after_its_last_note_is_not_rendered(tmp_path):
    song = compose(3, bars=2, signature=(4, 4), tempo=120)
    late = song.max_tick + 10_000_000  # three hours
    song.tempo_changes.append(miditoolkit.TempoChange(100, late))
    song.time_signature_changes.append(miditoolkit.TimeSignature(3, 4, late))
    song.markers.append(miditoolkit.Marker("end", late))
    rendered = []

    def render(midi, soundfont):
        rendered.append(mido.MidiFile(file=io.BytesIO(midi)))
        return np.ones((44100 * 10, 2), np.int16), 44100

    watched = dataclasses.replace(sound.RENDERERS[0], render=render)
    Synthesizer(watched, tmp_path / "a.sf2").write_wav(song, tmp_path / "x.wav")
    end = max(note.end for track in song.instruments for note in track.notes)
    assert rendered[0].length == pytest.approx(end / 960 + FADE_SECONDS, abs=0.01)
    assert song.markers[-1].text == "end"


@pytest.mark.parametrize("what", ["too short", "panic"])
def test_what_a_synthesizer_fails_at_is_one_line(bare, midirenderer, tmp_path, what):
    """A full temporary folder leaves fluidsynth's file short; midirenderer panics at some damaged fonts."""

    class Panic(BaseException):
        """As of Rust: no Exception."""

    def render(midi, soundfont):
        if what == "panic":
            raise Panic("index out of bounds")
        return np.zeros((100, 2), np.int16), 44100

    failing = Synthesizer(dataclasses.replace(sound.RENDERERS[0], render=render), tmp_path / "a.sf2")
    says = "index out of bounds" if what == "panic" else "the audio ends before the song"
    with pytest.raises(UserError, match=says):
        failing.write_wav(compose(3, bars=2), tmp_path / "x.wav")
    assert not (tmp_path / "x.wav").exists()


def test_samples_as_floats_are_made_integers():
    loud = np.array([[3.0, -6.0], [0.0, 1.5]], dtype=np.float32)
    found = sound._normalised(loud)
    assert found.dtype == np.int16 and found.tolist() == [[14745, -29490], [0, 7373]]


@pytest.fixture
def words(bare, midirenderer, tmp_path):
    """A command that writes a song and its audio."""
    (bare / "a.sf2").write_bytes(SF2)
    save_untrained(tmp_path / "checkpoints", 2048)
    places = {"--checkpoint": tmp_path, "--output": tmp_path / "x.mid", "--wav": tmp_path / "x.wav"}
    band = ["--instruments", "piano", "--chords", "C", "--density", "piano 6", "--max_tokens", "60"]
    return [*(str(word) for place in places.items() for word in place), *band]


def test_the_command_writes_audio_beside_each_song(words, tmp_path, capsys):
    module.main([*words, "--num", "2", "--stream"])
    for line in capsys.readouterr().out.splitlines():
        json.loads(line)
    for number in (1, 2):
        assert read(tmp_path / f"x-{number}.wav")[1].any() and (tmp_path / f"x-{number}.mid").exists()


def test_who_does_not_wait_for_the_audio_has_all_songs(words, tmp_path, monkeypatch):
    write, calls = Synthesizer.write_wav, []

    def interrupted(self, midi, path):
        calls.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Synthesizer, "write_wav", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.main([*words, "--num", "3"])
    assert len(calls) == 1 and all((tmp_path / f"x-{number}.mid").exists() for number in (1, 2, 3))

    def failing(self, midi, path):
        if path.endswith("-1.wav"):
            raise UserError("no sound")
        write(self, midi, path)

    monkeypatch.setattr(Synthesizer, "write_wav", failing)
    with pytest.raises(UserError, match=r"^1 of 3 songs: no sound"):
        module.main([*words, "--num", "3", "--overwrite"])
    assert not (tmp_path / "x-1.wav").exists() and (tmp_path / "x-3.wav").exists()


def test_a_disk_that_fills_up_under_the_audio_keeps_the_song(words, tmp_path, monkeypatch):
    monkeypatch.setattr(sound, "write_atomic", full_disk)
    with pytest.raises(UserError, match=r"^cannot write the audio .*x\.wav: No space left"):
        module.main(words)
    assert (tmp_path / "x.mid").exists() and not (tmp_path / "x.wav").exists()


@pytest.mark.parametrize(
    "more, says",
    [
        (["--wav", "x.mp3"], r"--wav x\.mp3: must end in \.wav"),
        (["--wav", "none/x.wav"], "--wav none/x.wav: there is no folder"),
        (["--output", "same.wav", "--wav", "same.wav"], "--wav same.wav: is the same file as --output"),
        (
            ["--output", "old.wav", "--soundfont", "old.wav", "--overwrite"],
            "--output .*same file as --soundfont",
        ),
        (["--wav", "old.wav"], "--wav old.wav: old.wav exists already: .*--overwrite"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_audio_is_an_output_as_others_are(words, tmp_path, no_work, monkeypatch, more, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.wav").write_bytes(SF2)
    with pytest.raises(UserError, match=says):
        module.main([*words, *more])
    assert (tmp_path / "old.wav").read_bytes() == SF2


def test_a_soundfont_that_was_found_is_not_replaced(words, tmp_path, no_work):
    font = tmp_path / "fonts" / "a.sf2"
    with pytest.raises(UserError, match="is the same file as the SoundFont"):
        module.main([*words, "--output", str(font), "--overwrite"])
    assert font.read_bytes() == SF2


def test_a_soundfont_is_of_use_for_audio_only(tmp_path, no_work):
    with pytest.raises(UserError, match="--soundfont needs --wav"):
        module.main(["--checkpoint", "c", "--output", str(tmp_path / "x.mid"), "--soundfont", "a.sf2"])


@pytest.mark.parametrize("renderer", sound.RENDERERS, ids=lambda renderer: renderer.name)
def test_what_is_installed_renders_a_song(renderer, tmp_path):
    """Nothing of it is required: the name of a SoundFont in SOUNDFONT and a synthesizer run this test."""
    font = os.environ.get("SOUNDFONT")
    if font is None or not renderer.is_installed():
        pytest.skip(f"no {renderer.name}, or no SOUNDFONT")
    song = compose(3, bars=2)
    Synthesizer(renderer, sound.Path(font)).write_wav(song, tmp_path / "x.wav")
    params, samples = read(tmp_path / "x.wav")
    end = max(note.end for track in song.instruments for note in track.notes)
    seconds = sound._seconds(song, end)[0]
    assert params.nframes / params.framerate == pytest.approx(seconds + FADE_SECONDS, abs=0.01)
    assert np.abs(samples.astype(int)).max() == round(PEAK * 32767)
    assert np.abs(samples[-2 * params.framerate // 20 :].astype(int)).max() < 3000  # it has faded
    buffer = io.BytesIO((tmp_path / "x.wav").read_bytes())
    assert wave.open(buffer).getnchannels() == 2
