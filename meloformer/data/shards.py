"""Tokens on disk: shards of songs, written atomically and read song by song.

docs/data.md describes the format byte by byte. Nothing is pickled.
"""

import bisect
import hashlib
import mmap
import os
import re
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import (
    open_to_read,
    put_in_place,
    read_json,
    sha256_of_file,
    temporary_of,
    write_atomic,
    write_json,
)
from ..tokens import vocab
from .motifs import MOTIF_DTYPE

MAGIC = b"MELOSHRD"
VERSION = 2  # version 1 had neither motifs nor a division
TOKEN_DTYPE = np.dtype("<u2")
DIGEST_BYTES = 16
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
DIVISION = "division.bin"
TRAIN, VALIDATION, LEFT_OUT = range(3)  # values of the bytes in `division.bin`

_HEADER = struct.Struct("<8sII32sQQ")  # magic, version, bytes per token, fingerprint, songs, tokens
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def content_digest(ids: np.ndarray) -> bytes:
    """16-byte BLAKE2b digest of a song's token ids (uint16 [n])."""
    return hashlib.blake2b(_token_bytes(ids), digest_size=DIGEST_BYTES).digest()


def _token_bytes(ids: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(ids, dtype=TOKEN_DTYPE)).cast("B")


def field(source: Path, record: dict, key: str, kind: type | tuple[type, ...]):
    """The entry `key` of a record read from `source`; UserError if there is none of type `kind`."""
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{source}: the entry '{key}' is missing or of the wrong type")
    return value


def _listed_file(source: Path, record: dict, key: str) -> Path:
    """The file that entry `key` names; UserError unless it has the listed size and is in the same folder."""
    entry = field(source, record, key, dict)
    name = field(source, entry, "name", str)
    if not _PLAIN_NAME.fullmatch(name):
        raise UserError(f"{source}: refuses the file name {name!r}: not a plain name")
    path = source.parent / name
    if not path.is_file():
        raise UserError(f"{path}: is missing, though {source.name} lists it")
    if path.resolve().parent != source.parent.resolve():
        raise UserError(f"{path}: leads outside its folder")
    size, listed = path.stat().st_size, field(source, entry, "bytes", int)
    if size != listed:
        raise UserError(f"{path}: has {size} bytes where {source.name} lists {listed}")
    return path


def file_entry(path: Path) -> dict:
    """The manifest's entry for a file: name, bytes, SHA-256 (64 hex digits)."""
    digest, size = sha256_of_file(path)
    return _entry(path.name, size, digest)


def _entry(name: str, size: int, sha256: str) -> dict:
    return {"name": name, "bytes": size, "sha256": sha256}


def intact_file(source: Path, record: dict, key: str) -> Path:
    """Like `_listed_file`; UserError also unless the file has the listed SHA-256."""
    path = _listed_file(source, record, key)
    if file_entry(path) != record[key]:
        raise UserError(f"{path}: its SHA-256 is not the one in {source.name}: the file is damaged")
    return path


# --- one shard ------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


@dataclass(frozen=True)
class Index:
    """The content of a shard's .idx file about its n songs."""

    offsets: np.ndarray  # int64 [n + 1]: song i is tokens offsets[i] .. offsets[i + 1] - 1
    digests: np.ndarray  # uint8 [n, 16]
    bars: np.ndarray  # int32 [n]


def read_index(path: Path, fingerprint: str) -> Index:
    """Read and check an .idx file.

    Raises:
        UserError: it is damaged, has another format version, or belongs to another tokenizer than
            `fingerprint`.
    """
    with open_to_read(path) as file:
        data = file.read()
    if len(data) < _HEADER.size:
        raise UserError(f"{path}: is too short for a shard index")
    magic, version, width, written_for, songs, tokens = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise UserError(f"{path}: is not a shard index")
    if version != VERSION or width != TOKEN_DTYPE.itemsize:
        raise UserError(f"{path}: has format version {version}; this program reads version {VERSION}")
    if written_for.hex() != fingerprint:
        raise UserError(f"{path}: was written {vocab.mismatch(written_for.hex())}; run preprocess again")
    if len(data) != _HEADER.size + 8 + songs * (8 + DIGEST_BYTES + 4):
        raise UserError(f"{path}: its size does not fit its {songs} songs")
    at = _HEADER.size
    offsets = np.frombuffer(data, "<i8", songs + 1, at)
    at += offsets.nbytes
    digests = np.frombuffer(data, np.uint8, songs * DIGEST_BYTES, at).reshape(songs, DIGEST_BYTES)
    bars = np.frombuffer(data, "<i4", songs, at + digests.nbytes)
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) <= 0).any():
        raise UserError(f"{path}: its song offsets are damaged")
    if (bars < 0).any():
        raise UserError(f"{path}: its bar counts are damaged")
    return Index(offsets, digests, bars)


def read_motifs(path: Path, songs: int) -> tuple[np.ndarray, np.ndarray]:
    """The .motifs file of a shard: all hashes (uint64, mapped) and where each song's lie (int64 [songs + 1]).

    Raises:
        UserError: it is damaged, or is not for that many songs.
    """
    numbers = _map(path, MOTIF_DTYPE)
    at = len(numbers) - songs - 1
    offsets = numbers[max(at, 0) :].astype(np.int64)
    if at < 0 or offsets[0] != 0 or offsets[-1] != at or (np.diff(offsets) < 0).any():
        raise UserError(f"{path}: its motifs are damaged")
    return numbers[:at], offsets


class ShardWriter:
    """Writes one shard: `add` songs, then `finish`. Until then it has temporary files only.

    Memory: 36 bytes per song; tokens and motifs go to their files as they come.
    """

    def __init__(self, folder: Path, number: int, fingerprint: str):
        self._folder, self._name, self._fingerprint = Path(folder), shard_name(number), fingerprint
        self._tokens = _HashedFile(self._folder / f"{self._name}.bin")
        self._motifs = _HashedFile(self._folder / f"{self._name}.motifs")
        self._offsets, self._bars, self._digests = array("q", [0]), array("i"), bytearray()
        self._motif_offsets = array("q", [0])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._tokens.file.close()
        self._motifs.file.close()

    def add(self, ids: np.ndarray, bars: int, digest: bytes, motifs: np.ndarray) -> None:
        """Append a song: ids uint16 [n], n > 0; its `content_digest`; and its `motifs`, uint64 [m]."""
        self._tokens.write(_token_bytes(ids))
        self._motifs.write(memoryview(np.ascontiguousarray(motifs, MOTIF_DTYPE)).cast("B"))
        self._offsets.append(self._offsets[-1] + len(ids))
        self._motif_offsets.append(self._motif_offsets[-1] + len(motifs))
        self._bars.append(bars)
        self._digests += digest

    def finish(self, report: dict) -> dict:
        """Complete the shard; returns its completion record, which includes the entries of `report`.

        The record is written after the shard's other files are synced: a shard with a record is finished.
        """
        self._motifs.write(np.array(self._motif_offsets, dtype="<i8").tobytes())
        songs, tokens = len(self._bars), self._offsets[-1]
        header = _HEADER.pack(
            MAGIC, VERSION, TOKEN_DTYPE.itemsize, bytes.fromhex(self._fingerprint), songs, tokens
        )
        offsets = np.array(self._offsets, dtype="<i8").tobytes()
        bars = np.array(self._bars, dtype="<i4").tobytes()
        index = header + offsets + bytes(self._digests) + bars
        shard = {"bin": self._tokens.put_in_place(), "motifs": self._motifs.put_in_place()}
        index_name = f"{self._name}.idx"
        write_atomic(self._folder / index_name, index)
        shard |= {
            "idx": _entry(index_name, len(index), hashlib.sha256(index).hexdigest()),
            "songs": songs,
            "tokens": tokens,
        }
        record = {"shard": shard, **report}
        write_json(self._folder / f"{self._name}.json", record)
        return record


class _HashedFile:
    """A file written piece by piece, and the SHA-256 of what was written to it.

    A hash computed by reading the file back would miss what the disk had damaged.
    """

    def __init__(self, path: Path):
        self.file, self._path = open(temporary_of(path), "wb"), path
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def put_in_place(self) -> dict:
        """Sync the file and rename it to its final name; returns its entry for the manifest."""
        put_in_place(self.file, self._path)
        return _entry(self._path.name, self._size, self._hash.hexdigest())


def read_record(folder: Path, number: int, *, rehash: bool = False) -> dict | None:
    """The completion record of a shard; None if the shard is not finished.

    The sizes of its files are checked, with `rehash` also their hashes: UserError if they differ.
    """
    path = Path(folder) / f"{shard_name(number)}.json"
    if not path.exists():
        return None
    record = read_json(path)
    shard = field(path, record, "shard", dict)
    for key in ("songs", "tokens"):
        field(path, shard, key, int)
    try:
        for key in ("bin", "idx", "motifs"):
            (intact_file if rehash else _listed_file)(path, shard, key)
    except UserError as error:
        raise UserError(
            f"{error}; delete {path} and run preprocess again, which makes this shard anew"
        ) from None
    return record


# --- a folder of shards ---------------------------------------------------------------------------


class ShardSet:
    """All songs of a preprocessed folder, numbered from 0.

    `shards[i]` reads the tokens of a song, uint16 [n] and read-only. UserError if its file has been changed
    since it was opened, and the song with it.

    Opening checks the hashes of all files but those of tokens: `damage.find_damaged` checks these.

    Attributes:
        folder: the folder it was opened from.
        manifest: the content of its manifest.
        val_split: the fraction of songs meant for validation; 0 if they were named by --val_list.
        lengths: int64 [songs], tokens of each song.
        bars: int32 [songs], bars (CHORD tokens) of each song.
        digests: uint8 [songs, 16], content digests.
        division: uint8 [songs], TRAIN, VALIDATION or LEFT_OUT.
        damaged: int64, ascending, the songs that `leave_out` was called with.

    Raises:
        UserError: a file is missing or damaged, or the folder belongs to another tokenizer than `fingerprint`
            (64 hex digits; by default that of this program's vocabulary).
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: str | None = None):
        self.folder = Path(folder)
        source = self.folder / MANIFEST
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: is not a folder")
        if not source.is_file():
            raise UserError(f"{self.folder}: has no {MANIFEST}: preprocess has not finished there")
        self.manifest = read_json(source)
        if field(source, self.manifest, "version", int) != VERSION:
            raise UserError(f"{source}: has another format version than {VERSION}")
        fingerprint = vocab.fingerprint() if fingerprint is None else fingerprint
        written_for = field(source, self.manifest, "fingerprint", str)
        if written_for != fingerprint:
            raise UserError(f"{self.folder}: was written {vocab.mismatch(written_for)}; run preprocess again")
        val_split = field(source, self.manifest, "val_split", (int, float))
        if not 0 <= val_split < 1:
            raise UserError(f"{source}: val_split is not in [0, 1)")
        self.val_split = float(val_split)

        self._tokens: list[_TokenFile] = []
        self._offsets, self._first, indexes = [], [0], []
        for shard in field(source, self.manifest, "shards", list):
            if not isinstance(shard, dict):
                raise UserError(f"{source}: its list of shards is damaged")
            index_path = _listed_file(source, shard, "idx")
            index = read_index(index_path, fingerprint)
            path = _listed_file(source, shard, "bin")
            tokens = _TokenFile(path)
            if len(tokens) != index.offsets[-1]:
                raise UserError(f"{path}: does not belong to {index_path.name}: other number of tokens")
            if (len(index.bars), len(tokens)) != (shard.get("songs"), shard.get("tokens")):
                raise UserError(f"{index_path}: holds other counts than {MANIFEST}")
            intact_file(source, shard, "idx")  # last, as the checks above can say what is wrong
            indexes.append(index)
            self._tokens.append(tokens)
            self._offsets.append(index.offsets)
            self._first.append(self._first[-1] + len(index.bars))
        if not indexes:
            raise UserError(f"{source}: lists no shards")
        self.lengths = np.concatenate([np.diff(index.offsets) for index in indexes])
        self.bars = np.concatenate([index.bars for index in indexes])
        self.digests = np.concatenate([index.digests for index in indexes])
        path = _listed_file(source, self.manifest, "division")
        self.division = np.fromfile(path, np.uint8)
        if len(self.division) != len(self) or self.division.max(initial=0) > LEFT_OUT:
            raise UserError(f"{path}: does not divide the songs of {MANIFEST}")
        intact_file(source, self.manifest, "division")
        self.damaged = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, song: int) -> np.ndarray:
        shard, i = self.place(song)
        tokens, (first, last) = self._tokens[shard], self._offsets[shard][i : i + 2].tolist()
        ids = tokens.read(first, last)
        if tokens.changed() and content_digest(ids) != self.digests[song].tobytes():
            raise UserError(f"{tokens.path}: has been changed since it was opened")
        return ids

    def place(self, song: int) -> tuple[int, int]:
        """Number of the shard that a song lies in, and of the song in it."""
        if not 0 <= song < len(self):
            raise IndexError(f"song {song} of {len(self)}")
        shard = bisect.bisect_right(self._first, song) - 1
        return shard, song - self._first[shard]

    def by_shard(self) -> list[np.ndarray]:
        """Numbers of the songs in each shard, int64, ascending."""
        return np.split(np.arange(len(self)), self._first[1:-1])

    def is_intact(self, shard: int) -> bool:
        """Whether the tokens of a shard have the SHA-256 that the manifest lists for them."""
        return self._tokens[shard].sha256() == self.manifest["shards"][shard]["bin"].get("sha256")

    def name(self, song: int) -> str:
        """Where a song lies, for messages."""
        shard, i = self.place(song)
        return f"{self._tokens[shard].path}: song {i}"

    def leave_out(self, damaged: np.ndarray) -> None:
        """Use these songs (int64, ascending) neither for training nor for validation, from now on."""
        self.damaged = damaged
        self.division[damaged] = LEFT_OUT

    def split(self, name: str) -> np.ndarray:
        """Numbers of the songs in "train" or "val" (int64, ascending); songs left out are in neither."""
        if name not in ("train", "val"):
            raise ValueError(f"no split {name!r}: it is 'train' or 'val'")
        return np.flatnonzero(self.division == (VALIDATION if name == "val" else TRAIN))

    def sha256(self) -> str:
        """SHA-256 of the digests of all songs and of their division (64 hex digits), without `damaged`."""
        return hashlib.sha256(self.digests.tobytes() + self.division.tobytes()).hexdigest()


class _TokenFile:
    """The tokens of a shard; read, not mapped: if a mapped file shrinks, SIGBUS kills the process."""

    def __init__(self, path: Path):
        self.path, self._file = path, open_to_read(path)
        self._when_opened = self._status()

    def __len__(self) -> int:
        return self._when_opened[0] // TOKEN_DTYPE.itemsize

    def _status(self) -> tuple[int, int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns  # who copies may set the second back

    def changed(self) -> bool:
        """Whether the file has been written to since it was opened."""
        return self._status() != self._when_opened

    def sha256(self) -> str:
        digest, at = hashlib.sha256(), 0
        while block := os.pread(self._file.fileno(), 1 << 20, at):
            digest.update(block)
            at += len(block)
        return digest.hexdigest()

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens `first` to `last` - 1, uint16."""
        size = (last - first) * TOKEN_DTYPE.itemsize
        data = os.pread(self._file.fileno(), size, first * TOKEN_DTYPE.itemsize)
        if len(data) < size:
            raise UserError(f"{self.path}: has become shorter since it was opened")
        return np.frombuffer(data, TOKEN_DTYPE)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    with open_to_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < dtype.itemsize:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype, size // dtype.itemsize)
