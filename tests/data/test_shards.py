"""Shards: what is written comes back, and nothing damaged is ever read."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from meloformer.data import shards
from meloformer.data.damage import verify
from meloformer.data.division import in_validation
from meloformer.data.shards import ShardSet, ShardWriter, content_digest
from meloformer.errors import UserError
from meloformer.files import TEMPORARY
from meloformer.tokens import vocab

from helpers.folders import write_folder

OTHER_FINGERPRINT = "ab" * 32


def song(generator: np.random.Generator, bars: int) -> np.ndarray:
    """A song of the grammar: one chord of notes per bar."""
    first = vocab.INST.start, vocab.T.start, vocab.P.start, vocab.L.start, vocab.V.start
    ids = [vocab.BOS, vocab.BAND.start]
    for bar in range(bars):
        ids.append(generator.integers(vocab.CHORD.start, vocab.CHORD.stop))
        ids += [vocab.TS.start, vocab.BPM.start] if bar == 0 else []
        pitches = generator.choice(np.arange(1, 100), generator.integers(1, 30), replace=False)
        ids += [*first, *(vocab.P.start + np.sort(pitches))]
    return np.array([*ids, vocab.EOS], dtype=np.uint16)


PER_SHARD = (15, 0, 25)
SONGS = [song(np.random.default_rng(i), bars=1 + i % 7) for i in range(40)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("shards") / "data", SONGS, PER_SHARD)


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def test_songs_come_back(pristine):
    songs = ShardSet(pristine)
    assert len(songs) == len(SONGS)
    for i in np.random.default_rng(0).permutation(len(SONGS)):
        assert songs[int(i)].dtype == np.uint16
        np.testing.assert_array_equal(songs[int(i)], SONGS[i])
    np.testing.assert_array_equal(songs.lengths, [len(ids) for ids in SONGS])
    np.testing.assert_array_equal(songs.bars, [1 + i % 7 for i in range(len(SONGS))])
    for outside in (-1, len(SONGS)):
        with pytest.raises(IndexError):
            songs[outside]


def test_songs_are_read_only_views(pristine):
    ids = ShardSet(pristine)[3]
    assert not ids.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_the_bytes_are_as_documented(pristine):
    """Reads the files with struct alone, by docs/data.md."""
    index = (pristine / "shard-00002.idx").read_bytes()
    magic, version, width = struct.unpack_from("<8sII", index, 0)
    assert (magic, version, width) == (b"MELOSHRD", 2, 2)
    assert index[16:48].hex() == vocab.fingerprint()
    songs, tokens = struct.unpack_from("<QQ", index, 48)
    assert songs == 25
    offsets = struct.unpack_from(f"<{songs + 1}q", index, 64)
    assert offsets[-1] == tokens == sum(len(ids) for ids in SONGS[15:])
    at = 64 + 8 * (songs + 1)
    assert index[at : at + 16] == content_digest(SONGS[15])
    at += 16 * songs
    assert struct.unpack_from("<i", index, at) == (1 + 15 % 7,)
    assert len(index) == at + 4 * songs
    tokens_file = (pristine / "shard-00002.bin").read_bytes()
    assert tokens_file == b"".join(struct.pack(f"<{len(ids)}H", *ids) for ids in SONGS[15:])


def test_split_depends_on_content_only(pristine, tmp_path):
    other = write_folder(tmp_path / "other", SONGS[::-1], (40,))

    def members(folder, name):
        songs = ShardSet(folder)
        return {content_digest(songs[int(i)]) for i in songs.split(name)}

    train, val = members(pristine, "train"), members(pristine, "val")
    assert train.isdisjoint(val)
    assert len(train | val) == len(SONGS)
    assert len(val) > 0
    assert (members(other, "train"), members(other, "val")) == (train, val)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
def test_val_split_is_a_share(share):
    digests = np.random.default_rng(0).integers(0, 256, (20_000, 16), dtype=np.uint8)
    assert in_validation(digests, share).mean() == pytest.approx(share, abs=0.01)


def test_verify_accepts_what_was_written(pristine):
    assert len(verify(pristine)) == len(SONGS)


def test_no_temporary_file_is_left(pristine):
    assert not list(pristine.glob("*" + TEMPORARY))


def test_reading_needs_neither_pickle_nor_torch():
    assert "import pickle" not in Path(shards.__file__).read_text(encoding="utf-8")
    code = "import sys, meloformer.data.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def patch(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def patch_manifest(folder: Path, change) -> None:
    path = folder / shards.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


INDEX = "shard-00000.idx"
INDEX_DAMAGE = {
    "magic": (0, b"X", "not a shard index"),
    "version": (8, b"\3", "format version 3"),
    "token width": (12, b"\4", "format version"),
    "fingerprint": (16, b"\0\0\0\0", "another tokenizer"),
    "more songs": (48, struct.pack("<Q", 16), "size does not fit"),
    "absurdly many songs": (48, struct.pack("<Q", 2**63), "size does not fit"),
    "token count": (56, struct.pack("<Q", 12345), "song offsets"),
    "first offset": (64, struct.pack("<q", 1), "song offsets"),
    "offset not ascending": (72, struct.pack("<q", 0), "song offsets"),
    "negative offset": (72, struct.pack("<q", -5), "song offsets"),
    "offset out of range": (80, struct.pack("<q", 2**40), "song offsets"),
    "negative bars": (64 + 8 * 16 + 16 * 15, struct.pack("<i", -1), "bar counts"),
}


@pytest.mark.parametrize("case", INDEX_DAMAGE)
def test_damaged_index_is_refused(folder, case):
    at, data, message = INDEX_DAMAGE[case]
    patch(folder / INDEX, at, data)
    with pytest.raises(UserError, match=message) as caught:
        ShardSet(folder)
    assert INDEX in str(caught.value)


@pytest.mark.parametrize("name", ["shard-00000.bin", INDEX])
@pytest.mark.parametrize("size", [0, 10, -1, 1], ids=["empty", "10 bytes", "one less", "one more"])
def test_wrong_size_is_refused(folder, name, size):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data + b"\0" if size == 1 else data[:size])
    with pytest.raises(UserError, match=rf"{name}: has \d+ bytes"):
        ShardSet(folder)


@pytest.mark.parametrize("name", ["shard-00002.bin", "shard-00002.idx", shards.MANIFEST])
def test_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        ShardSet(folder)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        ShardSet(tmp_path / "nowhere")


def test_index_of_another_shard_is_refused(folder):
    def swap(manifest):
        first, _, last = manifest["shards"]
        first["idx"], last["idx"] = last["idx"], first["idx"]

    patch_manifest(folder, swap)
    with pytest.raises(UserError, match="does not belong to"):
        ShardSet(folder)


def test_data_of_the_first_token_format_is_refused_by_name(tmp_path):
    (first,) = vocab.EARLIER_VERSIONS
    folder = write_folder(tmp_path / "other", SONGS, (40,), fingerprint=first)
    with pytest.raises(UserError, match=r"in version 1 of the token format.*run preprocess again"):
        ShardSet(folder)


def test_other_tokenizer_is_refused(tmp_path):
    folder = write_folder(tmp_path / "other", SONGS, (40,), fingerprint=OTHER_FINGERPRINT)
    with pytest.raises(UserError, match="another tokenizer"):
        ShardSet(folder)
    assert len(ShardSet(folder, OTHER_FINGERPRINT)) == len(SONGS)


NAMES = ["x" * 300, "../shard-00000.bin", "/etc/hostname", "a/b.bin", "..", ".", "", "a\0b", "a\\b", "-x"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_names_that_leave_the_folder_are_refused(folder, name):
    patch_manifest(folder, lambda manifest: manifest["shards"][0]["bin"].update(name=name))
    with pytest.raises(UserError, match="not a plain name"):
        ShardSet(folder)


def test_link_out_of_the_folder_is_refused(folder, tmp_path):
    outside = tmp_path / "outside.bin"
    os.rename(folder / "shard-00000.bin", outside)
    (folder / "shard-00000.bin").symlink_to(outside)
    with pytest.raises(UserError, match="leads outside"):
        ShardSet(folder)


MANIFEST_DAMAGE = {
    "no JSON": (lambda path: path.write_text("{"), "is not JSON"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "deep": (lambda path: path.write_text("[" * 200_000), "is not JSON"),
    "a list": (lambda path: path.write_text("[]"), "JSON object"),
    "empty object": (lambda path: path.write_text("{}"), "'version'"),
}


@pytest.mark.parametrize("case", MANIFEST_DAMAGE)
def test_broken_manifest_is_refused(folder, case):
    damage, message = MANIFEST_DAMAGE[case]
    damage(folder / shards.MANIFEST)
    with pytest.raises(UserError, match=message):
        ShardSet(folder)


FIELD_DAMAGE = {
    "version": ("version", 1),
    "version not a number": ("version", "1"),
    "no fingerprint": ("fingerprint", None),
    "val_split 1": ("val_split", 1.0),
    "val_split beyond all floats": ("val_split", 10**400),
    "val_split not a number": ("val_split", float("nan")),
    "val_split true": ("val_split", True),
    "no shards": ("shards", []),
    "shards of strings": ("shards", ["x"]),
    "shards an object": ("shards", {}),
}


@pytest.mark.parametrize("case", FIELD_DAMAGE)
def test_wrong_manifest_field_is_refused(folder, case):
    key, value = FIELD_DAMAGE[case]
    patch_manifest(folder, lambda manifest: manifest.update({key: value}))
    with pytest.raises(UserError) as caught:
        ShardSet(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message


def test_other_counts_are_refused(folder):
    patch_manifest(folder, lambda manifest: manifest["shards"][0].update(songs=14))
    with pytest.raises(UserError, match="other counts"):
        ShardSet(folder)


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00002.bin", "tokenizer.json"])
def test_verify_sees_one_flipped_bit(folder, name):
    path = folder / name
    at = path.stat().st_size // 2
    patch(path, at, bytes([path.read_bytes()[at] ^ 1]))
    ShardSet(folder)  # sizes and offsets are right
    with pytest.raises(UserError, match=rf"{name}: its SHA-256"):
        verify(folder)


def test_verify_sees_a_changed_digest(folder):
    patch(folder / INDEX, 64 + 8 * 16, b"\1\2\3\4")
    with pytest.raises(UserError, match=rf"{INDEX}: its SHA-256"):
        verify(folder)


BAND, BAR = vocab.BAND.start, [vocab.CHORD.start, vocab.TS.start, vocab.BPM.start]
BAD_SONGS = {
    "token 3: id": ([vocab.BOS, BAND, vocab.CHORD.start, vocab.VOCAB_SIZE, vocab.EOS], 1),
    "token 3: EOS may not follow": ([vocab.BOS, BAND, vocab.CHORD.start, vocab.EOS], 1),
    "token 1: CHORD_N may not follow BOS": ([vocab.BOS, *BAR, vocab.EOS], 1),
    "from BOS to EOS": ([BAND, *BAR, vocab.EOS], 1),
    "number of bars": ([vocab.BOS, BAND, *BAR, vocab.EOS], 2),
}


@pytest.mark.parametrize("message", BAD_SONGS)
def test_verify_looks_into_songs(tmp_path, message):
    """Hashes that fit do not make up for a writer that went wrong."""
    ids, bars = BAD_SONGS[message]
    folder = write_folder(tmp_path / "data", SONGS[:1], (1,))
    with ShardWriter(folder, 0, vocab.fingerprint()) as writer:
        ids = np.array(ids, dtype=np.uint16)
        writer.add(ids, bars, content_digest(ids), np.zeros(0, np.uint64))
        entry = writer.finish({})["shard"]
    patch_manifest(folder, lambda manifest: manifest.update(shards=[entry]))
    with pytest.raises(UserError, match=message):
        verify(folder)


def test_verify_wants_the_completion_record(folder):
    (folder / "shard-00001.json").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.json"):
        verify(folder)


def test_same_songs_same_bytes(pristine, tmp_path):
    again = write_folder(tmp_path / "again", SONGS, PER_SHARD)
    for path in pristine.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
