"""Divides songs into training and validation songs and those that are left out."""

from collections.abc import Set
from dataclasses import dataclass

import numpy as np

from .shards import LEFT_OUT, TRAIN, VALIDATION


@dataclass(frozen=True)
class Division:
    """The division of the songs of a folder.

    side: uint8 [songs], TRAIN, VALIDATION or LEFT_OUT.
    kept: int64 [songs], the representative of the cluster of each song; for a song that is left out, the one
        that is kept in its place.
    clusters: number of clusters of at least two songs.
    clustered: number of songs in these clusters.
    largest: number of songs in the largest of them; 0 if there is none.
    """

    side: np.ndarray
    kept: np.ndarray
    clusters: int
    clustered: int
    largest: int


def in_validation(digests: np.ndarray, val_split: float) -> np.ndarray:
    """Which songs (digests uint8 [n, 16]) are for validation if a fraction `val_split` is (bool [n]).

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
    """Divide songs so that no training song has a near-duplicate among the validation songs.

    The representative of a cluster is its song with most tokens, of several the one with the lowest digest.
    Its digest decides the side of the whole cluster, unless songs are named.

    Args:
        cluster: int64 [songs], equal for songs of one cluster.
        lengths: int64 [songs], tokens.
        digests: uint8 [songs, 16].
        val_split: fraction of songs for validation, if none are named.
        named: digests of the validation songs. Their other near-duplicates are left out, also with
            `keep_all`. None: `val_split` decides.
        keep_all: keep near-duplicates instead of only the representative.
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
