import mido

from benchmarks.fidelity import notes_by_key
from meloformer.midi.reader import read_midi
from meloformer.midi.writer import write_midi
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.songs import song


def played(path):
    """(tick, program or 'drums', pitch) of every note as a player with 16 channels hears it."""
    programs, heard, now = {}, set(), 0
    for message in mido.merge_tracks(mido.MidiFile(path).tracks):
        now += message.time
        if message.type == "program_change":
            programs[message.channel] = message.program
        elif message.type == "note_on" and message.velocity:
            heard.add((now, "drums" if message.channel == 9 else programs[message.channel], message.note))
    return heard


def many_programs(count):
    notes = [(128, 36, t, t + 6) for t in range(0, 96, 24)]
    notes += [(program, 60, t, t + 24) for program in range(count) for t in (0, 24, 72)]
    return HIDTokenizer().decode(HIDTokenizer().encode(song(notes)))


def test_fifteen_programs_have_a_channel_each_and_drums_channel_ten(tmp_path):
    write_midi(many_programs(15), tmp_path / "song.mid")
    channels = {}
    for track in mido.MidiFile(tmp_path / "song.mid").tracks:
        for message in track:
            if message.type == "program_change":
                channels.setdefault(message.channel, []).append(message.program)
    assert len(channels) == 16 and all(len(programs) == 1 for programs in channels.values())


def test_more_programs_than_channels_still_play_right(tmp_path):
    midi = many_programs(40)
    write_midi(midi, tmp_path / "song.mid")
    expected = {
        (note.start, "drums" if track.is_drum else track.program, note.pitch)
        for track in midi.instruments
        for note in track.notes
    }
    assert played(tmp_path / "song.mid") == expected
    assert notes_by_key(read_midi(tmp_path / "song.mid")) == notes_by_key(midi)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "song.mid"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    try:
        write_midi(many_programs(2), path)
    except OSError:
        pass
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
