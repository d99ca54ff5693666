"""Songs as audio: what a synthesizer that is installed makes of them with a SoundFont."""

import copy
import io
import os
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import miditoolkit
import numpy as np

from ..errors import UserError
from ..files import write_atomic
from ..midi.writer import midi_bytes

Samples = tuple[np.ndarray, int]  # [frames, 2], int16 or float32 of any loudness; frames per second

FADE_SECONDS = 2.0  # after the last note: strings and cymbals end later than their notes
MAX_SECONDS = 2 * 3600  # synthesizers hold all of it in memory, several times
PEAK = 0.9  # of what 16 bits hold; as they come, midirenderer's songs peak at a fifth
FOLDERS = (
    "/usr/share/sounds/sf2",  # Debian
    "/usr/share/sounds/sf3",
    "/usr/share/soundfonts",  # Arch, Fedora
    "/usr/local/share/soundfonts",
    "/opt/homebrew/share/soundfonts",
    "~/.local/share/soundfonts",
)
# Whole General MIDI sets come first: a folder may also hold single instruments.
NAMES = ("default*", "FluidR3*", "MuseScore*", "TimGM6mb*", "*")

NO_RENDERER = (
    "audio needs a synthesizer: pip install midirenderer, or install the program fluidsynth (Debian: apt "
    "install fluidsynth)"
)
NO_SOUNDFONT = (
    "audio needs a SoundFont, and none is in the usual folders: name one with --soundfont FILE, or install "
    "one (Debian: apt install timgm6mb-soundfont, or fluid-soundfont-gm, which is better and larger)"
)


def _by_midirenderer(midi: bytes, soundfont: Path) -> Samples:
    import midirenderer

    # Returns the bytes of a WAV file: 48 kHz, stereo, int16. It ends with the last event of the MIDI file.
    return _read(io.BytesIO(midirenderer.render_wave_from(soundfont.read_bytes(), midi)))


def _by_tinysoundfont(midi: bytes, soundfont: Path) -> Samples:
    from tinysoundfont import Sequencer, Synth
    from tinysoundfont.midi import load_memory

    rate = 44100
    synth = Synth(samplerate=rate)
    synth.sfload(str(soundfont))
    events = load_memory(midi, persistent=False)  # those that it keeps for seeking slow it down
    Sequencer(synth).add(events)
    # Samples are float32, left and right in turn, and may be above 1. Markers are no events.
    seconds = max((event.t for event in events), default=0.0) + FADE_SECONDS
    return np.frombuffer(synth.generate(round(seconds * rate)), np.float32).reshape(-1, 2), rate


def _by_fluidsynth(midi: bytes, soundfont: Path) -> Samples:
    with tempfile.TemporaryDirectory() as folder:
        song, sound = Path(folder, "song.mid"), Path(folder, "song.wav")
        song.write_bytes(midi)
        # A WAV file, stereo, int16; its default gain of 0.2 leaves room against clipping.
        words = ["-n", "-i", "-q", "-T", "wav", "-O", "s16", "-r", "44100", "-F", sound]
        words += [soundfont.absolute(), song]
        # In a session of its own a Ctrl-C, which keeps the song, does not end it.
        done = subprocess.run(["fluidsynth", *words], start_new_session=True, **_CAPTURED)
        # Without a SoundFont that it can read it plays silence, and exits with 0.
        if not sound.exists() or "Failed to load the SoundFont" in done.stderr:
            raise RuntimeError(" ".join(done.stderr.split()) or f"exit code {done.returncode}")
        return _read(sound.open("rb"))


_CAPTURED = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}


@dataclass(frozen=True)
class Renderer:
    """A synthesizer that may be installed.

    render: (MIDI file, SoundFont) -> its samples.
    reads_sf3: whether it reads SoundFonts whose samples are compressed.
    """

    name: str
    is_installed: Callable[[], bool]
    render: Callable[[bytes, Path], Samples]
    reads_sf3: bool


# The first one that is installed and reads the SoundFont is used.
RENDERERS = (
    Renderer("midirenderer", lambda: find_spec("midirenderer") is not None, _by_midirenderer, False),
    Renderer("fluidsynth", lambda: shutil.which("fluidsynth") is not None, _by_fluidsynth, True),
    Renderer("tinysoundfont", lambda: find_spec("tinysoundfont") is not None, _by_tinysoundfont, True),
)


@dataclass(frozen=True)
class Synthesizer:
    """A renderer with a SoundFont. `find` gives one."""

    renderer: Renderer
    soundfont: Path

    @classmethod
    def find(cls, soundfont: str | os.PathLike | None = None) -> "Synthesizer":
        """One that is installed, with a SoundFont, tried with a note.

        Args:
            soundfont: its file; None takes the one that the environment variable SOUNDFONT names, or else
                one from the usual folders of the system.

        Raises:
            UserError: there is no renderer or no SoundFont, or they do not go together; the message says how
                to get one.
        """
        renderers = [renderer for renderer in RENDERERS if renderer.is_installed()]
        if not renderers:
            raise UserError(NO_RENDERER)
        named = soundfont or os.environ.get("SOUNDFONT")
        if named:
            said = f"--soundfont {named}" if soundfont else f"SOUNDFONT={named}"
            if not is_soundfont(Path(named)):
                raise UserError(f"{said}: is no SoundFont (a .sf2 or .sf3 file)")
        for font in [Path(named)] if named else installed_soundfonts():
            for renderer in renderers:
                if renderer.reads_sf3 or not is_compressed(font):
                    found = cls(renderer, font)
                    found._try()
                    return found
        if named:
            raise UserError(
                f"{said}: its samples are compressed (.sf3), which midirenderer does not read: name a .sf2 "
                "file, or install the program fluidsynth"
            )
        raise UserError(NO_SOUNDFONT)

    def write_wav(self, midi: miditoolkit.MidiFile, path: str | os.PathLike) -> None:
        """Write a song as a WAV file, stereo, 16 bits, whole or not at all; its loudest sample is `PEAK`.

        Raises:
            OSError: the file cannot be written.
            UserError: the song cannot be rendered.
        """
        samples, rate = self._render(midi)
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setparams((2, 2, rate, len(samples), "NONE", ""))
            file.writeframes(_normalised(samples).tobytes())
        write_atomic(path, buffer.getbuffer())

    def _render(self, midi: miditoolkit.MidiFile) -> Samples:
        end = max((note.end for track in midi.instruments for note in track.notes), default=0)
        seconds, tempo = _seconds(midi, end)
        if seconds > MAX_SECONDS:
            raise UserError(f"a song of {seconds / 3600:.1f} hours is too long to be rendered as audio")
        # A marker is silent, and files last until their last event. That of a given song may be hours later.
        fade = round(FADE_SECONDS * tempo / 60 * midi.ticks_per_beat)
        sounding = copy.copy(midi)
        for name in ("tempo_changes", "time_signature_changes", "markers"):
            setattr(sounding, name, [event for event in getattr(midi, name) if event.time < end])
        sounding.markers.append(miditoolkit.Marker("", end + fade))
        try:
            samples, rate = self.renderer.render(midi_bytes(sounding), self.soundfont)
            if len(samples) < seconds * rate:  # as fluidsynth leaves it when the temporary folder is full
                raise RuntimeError("the audio ends before the song")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # each renderer has errors of its own; a panic of Rust is no Exception
            raise UserError(
                f"{self.renderer.name} cannot render a song with the SoundFont {self.soundfont}: "
                f"{error or type(error).__name__}"
            ) from None
        return samples[: round((seconds + FADE_SECONDS) * rate)], rate  # fluidsynth adds some seconds

    def _try(self) -> None:
        song, note = miditoolkit.MidiFile(), miditoolkit.Note(64, 60, 0, 480)
        song.instruments = [miditoolkit.Instrument(0, notes=[note])]
        self._render(song)


def is_soundfont(path: Path) -> bool:
    """Whether a file can be read and begins as SoundFonts do."""
    head = _head(path)
    return head[:4] == b"RIFF" and head[8:12] == b"sfbk"


def is_compressed(path: Path) -> bool:
    """Whether a SoundFont is of format 3 (.sf3), whose samples are Ogg Vorbis."""
    head = _head(path)
    version = head.find(b"ifil")
    return version >= 0 and head[version + 8 : version + 10] == b"\x03\x00"


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except (OSError, ValueError):  # ValueError: a path that no file can have
        return b""


def installed_soundfonts() -> Iterator[Path]:
    """SoundFonts in the usual folders, whole General MIDI sets first."""
    folders = [Path(os.path.expanduser(folder)) for folder in FOLDERS]  # Path's raises without a home
    for name in NAMES:
        for folder in folders:
            yield from (path for path in sorted(folder.glob(name)) if is_soundfont(path))


def _read(wav: io.IOBase) -> Samples:
    with wav, wave.open(wav) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.reshape(-1, 2), file.getframerate()


def _normalised(samples: np.ndarray) -> np.ndarray:
    """int16, with a peak of `PEAK`; silence stays silent."""
    peak = max(float(samples.max(initial=0)), -float(samples.min(initial=0)))
    return np.rint(samples * np.float32(PEAK * 32767 / peak if peak else 0)).astype("<i2")


def _seconds(midi: miditoolkit.MidiFile, end: int) -> tuple[float, float]:
    """When the tick `end` sounds, and the tempo there, in quarter notes a minute."""
    seconds, at, tempo = 0.0, 0, 120.0
    for change in sorted(midi.tempo_changes, key=lambda change: change.time):
        if change.time >= end:
            break
        seconds += (change.time - at) / midi.ticks_per_beat * 60 / tempo
        at, tempo = change.time, change.tempo
    return seconds + (end - at) / midi.ticks_per_beat * 60 / tempo, tempo
