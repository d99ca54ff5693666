"""Preprocessed folders for tests, made without MIDI files."""

from pathlib import Path

import numpy as np

from meloformer.data import shards
from meloformer.data.division import in_validation
from meloformer.data.motifs import motifs
from meloformer.data.shards import ShardWriter, content_digest
from meloformer.files import write_atomic, write_json
from meloformer.tokens import vocab


def write_folder(
    folder: Path,
    songs: list[np.ndarray],
    per_shard: tuple[int, ...],
    val_split: float = 0.3,
    fingerprint: str = vocab.fingerprint(),
) -> Path:
    """A folder as preprocess leaves it; `per_shard` says how many of the `songs` go to each shard."""
    folder.mkdir(exist_ok=True)
    entries, at = [], 0
    for number, count in enumerate(per_shard):
        with ShardWriter(folder, number, fingerprint) as writer:
            for ids in songs[at : at + count]:
                bars = int(np.count_nonzero(vocab.CHORD.mask(ids)))
                writer.add(ids, bars, content_digest(ids), motifs(ids))
            entries.append(writer.finish({"files": count})["shard"])
        at += count
    write_json(folder / shards.TOKENIZER, {"a": 1})
    digests = np.frombuffer(b"".join(map(content_digest, songs)), np.uint8).reshape(-1, shards.DIGEST_BYTES)
    side = np.where(in_validation(digests, val_split), shards.VALIDATION, shards.TRAIN)
    write_atomic(folder / shards.DIVISION, side.astype(np.uint8).tobytes())
    manifest = {
        "version": shards.VERSION,
        "fingerprint": fingerprint,
        "val_split": val_split,
        "division": shards.file_entry(folder / shards.DIVISION),
        "tokenizer": shards.file_entry(folder / shards.TOKENIZER),
        "shards": entries,
    }
    write_json(folder / shards.MANIFEST, manifest)
    return folder
