"""Songs that are damaged on disk: a fast check of all that are used, and a thorough one of a whole folder."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..tokens import grammar, vocab
from ..tokens.grammar_scan import broken_songs
from .motifs import motifs
from .shards import MANIFEST, ShardSet, content_digest, intact_file, read_motifs, read_record, shard_name

_AT_ONCE = 1 << 16  # tokens: enough for array operations, and few enough for the cache of a core


def find_damaged(
    shards: ShardSet, part: int = 0, parts: int = 1, *, threads: int = 1, shown: bool = False
) -> np.ndarray:
    """Those songs in training and validation whose tokens are not what preprocess wrote: int64, ascending.

    A song is damaged if its digest or its number of bars is not that of the index, if it breaks the grammar,
    or if it does not run from BOS to EOS.

    Args:
        part, parts: check only the given one of so many equal parts of the songs, in turn.
        threads: so many work at once; most of the time is spent in hashing and NumPy, which run in parallel.
        shown: show a progress bar if it takes more than a few seconds.

    Raises:
        UserError: a file was changed after it was opened.
    """
    used = np.concatenate([shards.split("train"), shards.split("val")])
    used.sort()
    tokens = int(shards.lengths[used].sum()) // parts
    found = [np.zeros(0, np.int64)]
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=tokens, unit="tok", unit_scale=True, desc="check songs", delay=3, disable=not shown
        ) as bar,
    ):
        for songs, damaged in pool.map(
            lambda songs: _check(shards, songs), _groups(shards, used)[part::parts]
        ):
            found.append(damaged)
            bar.update(int(shards.lengths[songs].sum()))
    return np.concatenate(found)


def _groups(shards: ShardSet, songs: np.ndarray) -> list[np.ndarray]:
    """The songs in groups of neighbours of about `_AT_ONCE` tokens, or of one longer song."""
    if not len(songs):
        return []
    group = np.cumsum(shards.lengths[songs]) // _AT_ONCE
    return np.split(songs, np.flatnonzero(np.diff(group)) + 1)


def _check(shards: ShardSet, songs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`songs`, and the damaged ones among them."""
    tokens = [shards[song] for song in songs.tolist()]
    damaged = np.array(
        [content_digest(ids) != shards.digests[song].tobytes() for ids, song in zip(tokens, songs)]
    )
    starts = np.cumsum(shards.lengths[songs]) - shards.lengths[songs]
    ids = np.concatenate(tokens)
    damaged |= np.add.reduceat(vocab.CHORD.mask(ids), starts, dtype=np.int32) != shards.bars[songs]
    damaged |= broken_songs(ids, starts)
    return songs, songs[damaged]


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
