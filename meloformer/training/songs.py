"""The songs of a run: opened and checked by all processes, damaged ones named and left out by all alike.

A song that cannot be read later, as its file was changed meanwhile, stops the run after the last step whose
songs could be read: `PackedSongs` hands out padding that is marked, and `Stepper` drops the step on all
ranks.
"""

import os
from pathlib import Path

import numpy as np
import torch

from ..data.batches import PackedSongs
from ..data.damage import find_damaged, is_checked, song_problem
from ..data.shards import ShardSet
from ..errors import UserError
from .distributed import Job

_NAMED = 10  # damaged songs that are named one by one
_MOST_THREADS = 8


def open_songs(folder: str, job: Job, *, strict: bool) -> ShardSet:
    """Collective: the songs of a folder, without those that are damaged.

    The processes of a machine share the work, as each machine may have a copy of its own. A song that is
    damaged in one copy is left out by all processes, so that all have the same rows.

    Args:
        strict: refuse a folder with damaged songs.

    Raises:
        UserError: a file is missing or damaged (on every rank that finds it so), or `strict` and a song is.
    """
    shards = ShardSet(folder)
    threads = min(_MOST_THREADS, max(1, (os.cpu_count() or 1) // job.local_world))
    marked = not job.any(not is_checked(shards))
    found = find_damaged(
        shards, job.local_rank, job.local_world, marked=marked, threads=threads, shown=job.is_rank0
    )
    damaged = torch.zeros(len(shards), device=job.device)
    damaged[torch.from_numpy(found)] = 1
    songs = np.flatnonzero(job.sum(damaged).cpu().numpy())
    shards.leave_out(songs)
    if not len(songs):
        return shards
    lines = [_line(shards, song) for song in songs[:_NAMED].tolist()]
    total = f"{len(songs)} damaged song(s)"
    if strict:
        raise UserError(f"--strict_data: {total}: {lines[0]}")
    if job.is_rank0:
        more = [f"... and {len(songs) - _NAMED} more"] if len(songs) > _NAMED else []
        print("\n".join([*lines, *more, f"left out: {total}; preprocess, run again, says how to mend them"]))
    return shards


def _line(shards: ShardSet, song: int) -> str:
    return f"{shards.name(song)} {song_problem(shards, song) or 'is damaged in the copy of another machine'}"


def raise_if_unread(data: tuple[PackedSongs, ...], saved_in: Path, job: Job) -> None:
    """Collective: raise UserError on all ranks if one could not read songs; the state is in `saved_in`."""
    failure = next((songs.failure for songs in data if songs.failure is not None), None)
    if job.any(failure is not None):
        raise UserError(
            f"{failure or 'another process could not read its songs'}; the state is saved in {saved_in}: "
            "restore the data and go on with --resume"
        )
