"""Which songs are trained on, which validate, and which are left out."""

from collections.abc import Set
from dataclasses import dataclass

import numpy as np

from .shards import LEFT_OUT, TRAIN, VALIDATION


@dataclass(frozen=True)
class Division:
    """Where the songs of a folder stand.

    side: uint8 [songs], TRAIN, VALIDATION or LEFT_OUT.
    kept: int64 [songs], the song that stands for the cluster of each: for a song that is left out, the one
        that is kept in its place.
    clusters: clusters of two songs or more.
    clustered: songs in those.
    largest: songs of the largest of them; 0 if there is none.
    """

    side: np.ndarray
    kept: np.ndarray
    clusters: int
    clustered: int
    largest: int


def in_validation(digests: np.ndarray, val_split: float) -> np.ndarray:
    """Which songs (digests uint8 [n, 16]) a share of `val_split` draws for validation (bool [n]).

    Depends on each song's content alone, not on other songs, their order or the shards.
    """
    number = np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0]
    return number < np.uint64(int(val_split * 2.0**64))


def divide(
    cluster: np.ndarray,
    lengths: np.ndarray,
    digests: np.ndarray,
    *,
    val_split: float,
    named: Set[bytes] | None,
    keep_all: bool,
) -> Division:
    """Divide songs so that none has a near-duplicate on the other side.

    The song that stands for a cluster is the one with most tokens, of several the one with the lowest digest.
    The side that its digest draws is that of the cluster.

    Args:
        cluster: int64 [songs], equal for songs of one cluster.
        lengths: int64 [songs], tokens.
        digests: uint8 [songs, 16].
        named: digests of the songs that validate, and no others. Their near-duplicates are left out, also
            with `keep_all`. None: drawn by `val_split`.
        keep_all: keep the near-duplicates.
    """
    songs = len(cluster)
    if named is None:
        chosen = np.zeros(songs, bool)
    else:
        chosen = np.fromiter((digest.tobytes() in named for digest in digests), bool, songs)
    order = np.lexsort((*digests.T[::-1], -lengths, ~chosen, cluster))
    starts = np.flatnonzero(np.diff(cluster[order], prepend=-1))
    sizes = np.diff(starts, append=songs)
    kept = np.empty(songs, np.int64)
    kept[order] = np.repeat(order[starts], sizes)

    drawn = chosen[kept] if named is not None else in_validation(digests, val_split)[kept]
    side = np.where(drawn, VALIDATION, TRAIN).astype(np.uint8)
    other = (kept != np.arange(songs)) & ~chosen
    side[other & (chosen[kept] | (not keep_all))] = LEFT_OUT
    several = sizes[sizes > 1]
    return Division(side, kept, len(several), int(several.sum()), int(several.max(initial=0)))
