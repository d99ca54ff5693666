"""Damaged songs are found before they are trained on, and files that change afterwards are told."""

import json
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest

from meloformer.data import damage
from meloformer.data.damage import check_once, find_damaged, is_checked, song_problem
from meloformer.data.shards import LEFT_OUT, ShardSet, ShardWriter, content_digest
from meloformer.errors import UserError
from meloformer.tokens import vocab
from meloformer.training.songs import open_songs

from helpers.folders import write_folder


@pytest.fixture
def folder(shards, tmp_path):
    return shutil.copytree(shards.folder, tmp_path / "shards")


def place(folder, song: int, token: int) -> tuple[str, int]:
    """The file and the byte that a token of a song begins at."""
    songs = ShardSet(folder)
    number, i = songs.place(song)
    return folder / f"shard-{number:05d}.bin", 2 * (int(songs._offsets[number][i]) + token)


def overwrite(folder, song: int, token: int, ids: list[int]) -> None:
    path, at = place(folder, song, token)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(np.array(ids, "<u2").tobytes())


def test_nothing_is_found_in_a_whole_folder(folder):
    assert find_damaged(ShardSet(folder)).tolist() == []


@pytest.mark.parametrize("token", [0, 7, -1], ids=["first", "inside", "last"])
def test_any_flipped_bit_is_found(folder, token):
    songs = ShardSet(folder)
    for song, bit in ((3, 0), (11, 15)):
        at = token % len(songs[song])
        overwrite(folder, song, at, [int(songs[song][at]) ^ (1 << bit)])
    songs = ShardSet(folder)
    assert find_damaged(songs).tolist() == [3, 11]
    assert all(song_problem(songs, song) for song in (3, 11))


def test_parts_and_threads_find_the_same(folder, monkeypatch):
    monkeypatch.setattr("meloformer.data.damage._AT_ONCE", 500)  # so that there are several groups
    for song in (0, 9, 10, 23):
        overwrite(folder, song, 5, [65535])
    songs = ShardSet(folder)
    assert find_damaged(songs, threads=3).tolist() == [0, 9, 10, 23]
    parts = [find_damaged(songs, part, 3).tolist() for part in range(3)]
    assert sorted(song for part in parts for song in part) == [0, 9, 10, 23]


BAR = [vocab.CHORD.start, vocab.TS.start, vocab.BPM.start]
WRONG = {
    "of no song": ([vocab.BOS, vocab.BAND.start, vocab.BPM.start, vocab.EOS], 0, "may not follow"),
    "outside the vocabulary": ([vocab.BOS, vocab.VOCAB_SIZE, vocab.EOS], 0, f"id {vocab.VOCAB_SIZE}"),
    "other bars": ([vocab.BOS, vocab.BAND.start, *BAR, vocab.EOS], 2, "number of bars"),
    "no end": ([vocab.BOS, vocab.BAND.start, *BAR], 1, "from BOS to EOS"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_right_digest_does_not_make_a_song(songs, tmp_path, case):
    ids, bars, says = WRONG[case]
    ids = np.array(ids, np.uint16)
    written = write_folder(tmp_path / "data", [songs[0], ids, songs[1]], (3,), val_split=0)
    write = ShardWriter.add
    shutil.rmtree(written)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            ShardWriter,
            "add",
            lambda self, own, counted, *more: write(self, own, bars if own is ids else counted, *more),
        )
        written = write_folder(tmp_path / "data", [songs[0], ids, songs[1]], (3,), val_split=0)
    found = ShardSet(written)
    assert content_digest(ids) == found.digests[1].tobytes()
    assert find_damaged(found).tolist() == [1]
    assert says in song_problem(found, 1)


def test_songs_left_out_are_in_no_split(folder):
    songs = ShardSet(folder)
    before, sha256 = {name: songs.split(name).tolist() for name in ("train", "val")}, songs.sha256()
    chosen = [before["train"][0], before["val"][0]]
    songs.leave_out(np.sort(chosen))
    for name, song in zip(("train", "val"), chosen):
        assert songs.split(name).tolist() == [other for other in before[name] if other != song]
    assert songs.sha256() != sha256  # so that no run goes on with other rows
    overwrite(folder, chosen[0], 3, [65535])
    again = ShardSet(folder)
    again.leave_out(find_damaged(again))
    assert again.damaged.tolist() == [chosen[0]]


def test_a_damaged_song_that_is_not_used_is_not_looked_for(folder):
    overwrite(folder, 4, 3, [65535])
    songs = ShardSet(folder)
    songs.leave_out(np.array([4]))
    assert find_damaged(songs).tolist() == []


def test_a_flipped_bit_in_index_or_division_is_told(folder):
    for name, at in (("division.bin", 2), ("shard-00002.idx", 64 + 8 * 15 + 3)):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(UserError, match=f"{name}: its SHA-256"):
            ShardSet(folder)
        (folder / name).write_bytes(data)


def test_a_file_that_shrinks_is_told_not_a_bus_error(folder):
    songs = ShardSet(folder)
    path, at = place(folder, 23, 0)
    os.truncate(path, at)
    with pytest.raises(UserError, match=r"shard-00002\.bin: has become shorter"):
        songs[23]


def test_a_song_that_changes_is_told_and_the_others_are_read_on(folder):
    songs = ShardSet(folder)
    before = songs[3]
    overwrite(folder, 4, 3, [vocab.PAD])
    path, _ = place(folder, 4, 3)
    os.utime(path, ns=(0, 0))  # as after a while: the clock of files may be coarse
    with pytest.raises(UserError, match=r"shard-00000\.bin: has been changed since"):
        songs[4]
    np.testing.assert_array_equal(songs[3], before)


def test_a_change_is_told_though_the_file_has_its_old_time(folder):
    """As `rsync --inplace --times` leaves it."""
    songs = ShardSet(folder)
    path, _ = place(folder, 4, 3)
    before = path.stat()
    time.sleep(0.05)  # the clock of files may be coarse
    overwrite(folder, 4, 3, [vocab.PAD])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"shard-00000\.bin: has been changed since"):
        songs[4]


def test_a_file_that_is_removed_is_read_on(folder):
    songs, before = ShardSet(folder), ShardSet(folder)[3]
    for path in folder.iterdir():
        path.unlink()
    np.testing.assert_array_equal(songs[3], before)


@pytest.fixture
def counted(monkeypatch):
    """The songs whose grammar is checked."""
    songs, check = [], damage.broken_songs
    monkeypatch.setattr(
        damage, "broken_songs", lambda ids, starts: songs.append(len(starts)) or check(ids, starts)
    )
    return songs


def test_the_songs_of_a_marked_folder_are_not_checked_again(folder, counted):
    songs = ShardSet(folder)
    assert not is_checked(songs)
    check_once(songs, threads=2)
    assert is_checked(songs) and sum(counted) == np.count_nonzero(songs.division != LEFT_OUT)
    counted.clear()
    check_once(ShardSet(folder), threads=1)
    assert find_damaged(ShardSet(folder), threads=3).tolist() == [] and not counted


def test_only_songs_of_changed_shards_of_a_marked_folder_are_checked(folder, counted):
    check_once(ShardSet(folder), threads=1)
    counted.clear()
    overwrite(folder, 3, 5, [65535])
    overwrite(folder, 23, 5, [int(ShardSet(folder)[23][5]) ^ 1])
    songs = ShardSet(folder)
    assert find_damaged(songs).tolist() == [3, 23]
    shards_of_both = np.concatenate([songs.by_shard()[songs.place(song)[0]] for song in (3, 23)])
    assert sum(counted) == len(shards_of_both)
    assert sorted(song for part in range(2) for song in find_damaged(songs, part, 2)) == [3, 23]


@pytest.mark.parametrize("marked", [False, True])
def test_songs_that_are_left_out_are_not_looked_at(folder, marked):
    if marked:
        check_once(ShardSet(folder), threads=1)
    for song in (3, 4):
        overwrite(folder, song, 5, [65535])
    songs = ShardSet(folder)
    songs.division[4] = LEFT_OUT
    assert find_damaged(songs).tolist() == [3]


def test_a_folder_with_damaged_songs_gets_no_mark(folder):
    overwrite(folder, 3, 5, [65535])
    with pytest.raises(UserError, match=r"shard-00000\.bin: song 3 is no song: .* says how to mend it"):
        check_once(ShardSet(folder), threads=1)
    assert not is_checked(ShardSet(folder))


def test_processes_that_share_the_songs_share_them_alike(folder, monkeypatch):
    """A preprocess may mark the folder after one of them has looked for the mark and before another does."""
    monkeypatch.setattr(damage, "_AT_ONCE", 500)  # so that there are several groups
    for module in ("meloformer.data.damage", "meloformer.training.songs"):
        marks = iter([False, True])
        monkeypatch.setattr(f"{module}.is_checked", lambda shards, marks=marks: next(marks))
    songs = ShardSet(folder)
    for song in range(len(songs)):
        overwrite(folder, song, 5, [65535])
    found = set()
    for rank in range(2):
        job = SimpleNamespace(
            device="cpu",
            local_rank=rank,
            local_world=2,
            is_rank0=rank == 0,
            any=lambda flag: True,  # as one of them has not found it
            sum=lambda damaged: damaged,
        )
        found.update(open_songs(folder, job, strict=False).damaged.tolist())
    assert found == set(np.flatnonzero(songs.division != LEFT_OUT).tolist())


@pytest.mark.parametrize("change", ["manifest", "mark", "version", "pipe"])
def test_a_mark_that_does_not_fit_is_of_no_use(folder, monkeypatch, change):
    check_once(ShardSet(folder), threads=1)
    if change == "manifest":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "note": "of another program"}))
    elif change == "mark":
        (folder / damage.CHECKED).write_bytes(b"{")
    elif change == "pipe":
        (folder / damage.CHECKED).unlink()
        os.mkfifo(folder / damage.CHECKED)
    else:
        monkeypatch.setattr(damage, "_CHECKS", damage._CHECKS + 1)
    assert not is_checked(ShardSet(folder))
