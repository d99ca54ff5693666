"""The songs to measure with, as token ids: from MIDI files, from .npy files, or composed."""

import sys
from pathlib import Path

import numpy as np

from meloformer.data.inputs import find_files
from meloformer.errors import MidiError, UserError

COMPOSED = 8
COMPOSED_BARS = 150


def read_songs(sources: list[str]) -> dict[str, np.ndarray]:
    """Token ids (int [n]) of each song, by name.

    Args:
        sources: MIDI files, .npy files of token ids, and folders; a folder with .npy files is read for those
            alone. Files of a folder that cannot be read are reported on stderr and skipped. Without
            sources `COMPOSED` songs are composed.

    Raises:
        UserError: a source is missing, a named file cannot be read, or no song is left.
    """
    if not sources:
        return compose_songs(COMPOSED, COMPOSED_BARS)
    songs: dict[str, np.ndarray] = {}
    for source in map(Path, sources):
        if not source.is_dir():
            try:
                songs[_unused(source.stem, songs)] = _read(source)
            except MidiError as error:
                raise UserError(f"{source}: {error}") from None
            continue
        token_files = sorted(source.rglob("*.npy"))
        for file in token_files or map(Path, find_files(str(source))):
            try:
                songs[_unused(file.stem, songs)] = _read(file)
            except MidiError as error:
                print(f"left out: {file.name}: {error}", file=sys.stderr)
    if not songs:
        raise UserError(f"{', '.join(sources)}: no file could be read")
    return songs


def compose_songs(count: int, bars: int) -> dict[str, np.ndarray]:
    """Token ids of composed songs, by name."""
    from meloformer.composer.compose import compose
    from meloformer.tokens.tokenizer import HIDTokenizer  # needs miditoolkit, files of token ids do not

    return {f"composed {seed}": HIDTokenizer().encode(compose(seed, bars=bars)) for seed in range(count)}


def _unused(name: str, taken: dict) -> str:
    """`name`, with a number where it is taken already."""
    return next(n for n in (name, *(f"{name} ({i})" for i in range(2, len(taken) + 3))) if n not in taken)


def _read(file: Path) -> np.ndarray:
    if file.suffix != ".npy":
        from meloformer.tokens.tokenizer import HIDTokenizer

        return HIDTokenizer().encode(file)
    try:
        ids = np.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise UserError(f"{file}: holds {ids.dtype} {list(ids.shape)}, not token ids [n]")
    return ids
