"""Songs that are damaged on disk: a fast check of all that are used, and a thorough one of a whole folder.

Checking the grammar takes longer than reading. So preprocess checks a folder once and marks it with
`CHECKED`; from then on only the SHA-256 of each shard is asked for.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..files import read_json, to_json, write_json
from ..tokens import grammar, vocab
from ..tokens.grammar_scan import broken_songs
from .motifs import motifs
from .shards import (
    LEFT_OUT,
    MANIFEST,
    ShardSet,
    content_digest,
    intact_file,
    read_motifs,
    read_record,
    shard_name,
)

Item, Value = TypeVar("Item"), TypeVar("Value")

CHECKED = "checked.json"
_CHECKS = 1  # to be raised when `find_damaged` looks for more than it did
_QUEUED = 64  # groups of songs, or shards
_AT_ONCE = 1 << 16  # tokens: enough for array operations, and few enough for the cache of a core


def find_damaged(
    shards: ShardSet,
    part: int = 0,
    parts: int = 1,
    *,
    marked: bool | None = None,
    threads: int = 1,
    shown: bool = False,
) -> np.ndarray:
    """Those songs in training and validation whose tokens are not what preprocess wrote: int64, ascending.

    A song is damaged if its digest or its number of bars is not that of the index, if it breaks the grammar,
    or if it does not run from BOS to EOS.

    In a folder with a mark that fits, shards are compared with the manifest first, and only songs of shards
    that differ are checked.

    Args:
        part, parts: check only the given one of so many parts of the songs, or of the shards, in turn.
        marked: what `is_checked` said. Processes that share the parts must agree on it, or songs are left
            unchecked between their parts; and a preprocess may write the mark meanwhile. None asks.
        threads: so many work at once; most of the time is spent in hashing and NumPy, which run in parallel.
        shown: show a progress bar if it takes more than a few seconds.

    Raises:
        UserError: a file was changed after it was opened.
    """
    used = np.flatnonzero(shards.division != LEFT_OUT)
    if is_checked(shards) if marked is None else marked:
        whole = shards.by_shard()
        numbers = range(part, len(whole), parts)
        tokens = [int(shards.lengths[whole[number]].sum()) for number in numbers]
        intact = _parallel(shards.is_intact, numbers, tokens, threads, shown)
        changed = [whole[number] for number, is_intact in zip(numbers, intact) if not is_intact]
        groups = [group for songs in changed for group in _groups(shards, np.intersect1d(songs, used))]
    else:
        groups = _groups(shards, used)[part::parts]
    tokens = [int(shards.lengths[songs].sum()) for songs in groups]
    damaged = _parallel(partial(_damaged_among, shards), groups, tokens, threads, shown)
    return np.concatenate([np.zeros(0, np.int64), *damaged])


def _parallel(
    function: Callable[[Item], Value], items: Sequence[Item], tokens: list[int], threads: int, shown: bool
) -> list[Value]:
    """The values of `function` for items that have so many tokens each."""
    settings = {"unit": "tok", "unit_scale": True, "desc": "check songs", "delay": 3, "disable": not shown}
    values = []
    with ThreadPoolExecutor(threads) as pool, tqdm(total=sum(tokens), **settings) as bar:
        for start in range(0, len(items), _QUEUED):
            for value in pool.map(function, items[start : start + _QUEUED]):
                bar.update(tokens[len(values)])
                values.append(value)
    return values


def is_checked(shards: ShardSet) -> bool:
    """Whether the folder is marked: the songs that its manifest describes were found whole."""
    path = shards.folder / CHECKED
    try:
        return path.is_file() and read_json(path) == _mark(shards)  # a pipe would never end
    except UserError:  # there is none, or it is damaged: then they are checked again
        return False


def check_once(shards: ShardSet, threads: int) -> None:
    """Check the songs of a folder, and mark it, unless it is marked already.

    Raises:
        UserError: a song is damaged: by the disk, or by a fault of this program.
    """
    if is_checked(shards):
        return
    damaged = find_damaged(shards, threads=threads, shown=True).tolist()
    if damaged:
        said = f"{shards.name(damaged[0])} {song_problem(shards, damaged[0])}"
        raise UserError(f"{said}; preprocess, run again, says how to mend it; training would leave it out")
    write_json(shards.folder / CHECKED, _mark(shards))


def _mark(shards: ShardSet) -> dict:
    # The manifest lists the SHA-256 of all other files, so it stands for them.
    return {"manifest": hashlib.sha256(to_json(shards.manifest)).hexdigest(), "checks": _CHECKS}


def _groups(shards: ShardSet, songs: np.ndarray) -> list[np.ndarray]:
    """The songs in groups of neighbours of about `_AT_ONCE` tokens, or of one longer song."""
    if not len(songs):
        return []
    group = np.cumsum(shards.lengths[songs]) // _AT_ONCE
    return np.split(songs, np.flatnonzero(np.diff(group)) + 1)


def _damaged_among(shards: ShardSet, songs: np.ndarray) -> np.ndarray:
    tokens = [shards[song] for song in songs.tolist()]
    damaged = np.array(
        [content_digest(ids) != shards.digests[song].tobytes() for ids, song in zip(tokens, songs)]
    )
    starts = np.cumsum(shards.lengths[songs]) - shards.lengths[songs]
    ids = np.concatenate(tokens)
    damaged |= np.add.reduceat(vocab.CHORD.mask(ids), starts, dtype=np.int32) != shards.bars[songs]
    damaged |= broken_songs(ids, starts)
    return songs[damaged]


def song_problem(shards: ShardSet, song: int) -> str | None:
    """What is wrong with a song, in words; None if nothing is. Slow: token by token."""
    ids = shards[song]
    try:
        grammar.check(ids)
    except ValueError as error:
        return f"is no song: {error}"
    if ids[0] != vocab.BOS or ids[-1] != vocab.EOS:
        return "does not run from BOS to EOS"
    if np.count_nonzero(vocab.CHORD.mask(ids)) != shards.bars[song]:
        return "has another number of bars than its index says"
    if content_digest(ids) != shards.digests[song].tobytes():
        return "has another digest than its index says"
    return None


def verify(folder: str | os.PathLike, fingerprint: str | None = None) -> ShardSet:
    """Check all shards and the tokenizer: hashes, digests, bar counts, motifs, and the grammar of every song.

    `build.verify` checks the other files of the folder.

    Raises:
        UserError: something is wrong; the message names the first such file.
    """
    songs = ShardSet(folder, fingerprint)
    source = songs.folder / MANIFEST
    intact_file(source, songs.manifest, "tokenizer")
    first = 0
    for number, shard in enumerate(songs.manifest["shards"]):
        path = intact_file(source, shard, "bin")
        index_path = source.parent / shard["idx"]["name"]
        motifs_path = intact_file(source, shard, "motifs")
        hashes, offsets = read_motifs(motifs_path, shard["songs"])
        record = read_record(songs.folder, number)
        if record is None or record["shard"] != shard:
            raise UserError(f"{songs.folder / shard_name(number)}.json: does not agree with {MANIFEST}")
        for i in range(shard["songs"]):
            problem = song_problem(songs, first + i)
            if problem is None and not np.array_equal(
                motifs(songs[first + i]), hashes[offsets[i] : offsets[i + 1]]
            ):
                problem = f"has other motifs than {motifs_path.name} says"
            if problem:
                raise UserError(f"{path}: song {i} {problem} ({index_path.name})")
        first += shard["songs"]
    return songs
