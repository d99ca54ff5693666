"""MIDI files -> shards of tokens. docs/data.md says what is guaranteed.

Worker processes import this module, so it must stay free of torch.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..errors import MidiError, UserError
from ..files import (
    TEMPORARY,
    atomic_writer,
    exclusive_lock,
    read_json,
    sync_folder,
    write_atomic,
    write_json,
)
from ..tokens import vocab
from ..tokens.tokenizer import HIDTokenizer
from . import damage, near_duplicates, shards
from .division import Division, divide
from .inputs import find_files, hash_of_names, in_order, named_files
from .motifs import motifs
from .table import ALL_REASONS, print_table
from .workers import Failure, Result, run_tasks

RUN = "run.json"
FAILED = "failed.tsv"
ELSEWHERE = "use another --output, or --overwrite to delete its files"

_OURS = re.compile(
    rf"(shard-\d{{5,}}\.(bin|idx|motifs|json)|{shards.MANIFEST}|{shards.TOKENIZER}|{shards.DIVISION}|{RUN}|{FAILED}|{damage.CHECKED})"
    rf"({re.escape(TEMPORARY)})?"
)


# --- one file: in a worker process ----------------------------------------------------------------


@cache
def _tokenizer() -> HIDTokenizer:
    return HIDTokenizer()


class Encoded(NamedTuple):
    """A MIDI file as tokens: ids uint16 [n], number of bars, codes of mends, and motifs (uint64 [m])."""

    ids: np.ndarray
    bars: int
    mends: list[str]
    motifs: np.ndarray


def encode_file(path: str, sustain: bool = False) -> Encoded | Failure:
    """The tokens of a MIDI file, or the reason to refuse it; runs in a worker process."""
    try:
        ids, mends = _tokenizer().encode_with_mends(path, sustain=sustain)
    except MidiError as error:
        return Failure(error.reason, error.detail)
    return Encoded(ids, int(np.count_nonzero(vocab.CHORD.mask(ids))), sorted(mends), motifs(ids))


# --- all files: in the parent ---------------------------------------------------------------------


def write_shards(
    folder: Path,
    results: Iterable[Result],
    total: int,
    shard_size: int,
    finished: int,
    seen: set[bytes],
    named: Set[str],
) -> None:
    """Write shards `finished`, `finished` + 1, ...: shard k holds files k * shard_size and after.

    Args:
        results: results of `encode_file` for files `finished * shard_size` .. `total` - 1, in order.
        seen: digests of the songs in finished shards; those of new songs are added.
        named: the files named by --val_list.
    """
    results = iter(results)
    for number in range(finished, -(-total // shard_size)):
        files = min(shard_size, total - number * shard_size)
        kept, named_digests, mends, failures = [], [], Counter(), []
        with shards.ShardWriter(folder, number, vocab.fingerprint()) as writer:
            for result in islice(results, files):
                value = result.failure or result.value
                if not isinstance(value, Failure):
                    digest = shards.content_digest(value.ids)
                    if result.item in named:
                        named_digests.append(digest.hex())
                    if digest not in seen:
                        seen.add(digest)
                        writer.add(value.ids, value.bars, digest, value.motifs)
                        kept.append(result.item)
                        mends.update(value.mends)
                        continue
                    value = Failure("duplicate", f"its tokens have the digest {digest.hex()}")
                failures.append([result.item, value.reason, value.detail])
            dropped = Counter(reason for _, reason, _ in failures)
            writer.finish(
                {
                    "files": files,
                    "kept": len(kept),
                    "paths": kept,
                    "named": named_digests,
                    "dropped": dict(dropped),
                    "mends": dict(mends),
                    "failures": failures,
                }
            )


def _records(folder: Path, count: int, *, rehash: bool = False) -> Iterator[dict]:
    """Completion records of shards 0, 1, ..., up to the first shard that is not finished."""
    for number in range(count):
        record = shards.read_record(folder, number, rehash=rehash)
        if record is None:
            return
        _check_report(folder / f"{shards.shard_name(number)}.json", record)
        yield record


def _check_report(source: Path, record: dict) -> None:
    """Raise UserError if the counts in a completion record are missing or contradict each other."""
    files, kept = (shards.field(source, record, key, int) for key in ("files", "kept"))
    dropped, mends = (shards.field(source, record, key, dict) for key in ("dropped", "mends"))
    failures = shards.field(source, record, "failures", list)
    for cells in failures:
        if not (isinstance(cells, list) and [type(cell) for cell in cells] == [str] * 3):
            raise UserError(f"{source}: its list of failures is damaged")
    if not all(
        type(cell) is str for key in ("paths", "named") for cell in shards.field(source, record, key, list)
    ):
        raise UserError(f"{source}: its list of songs is damaged")
    agree = (
        kept == record["shard"]["songs"] == len(record["paths"])
        and files == kept + len(failures)
        and dropped == Counter(reason for _, reason, _ in failures)
        and all(type(times) is int for times in mends.values())
    )
    if not agree:
        raise UserError(f"{source}: its counts are damaged")


def _claim(folder: Path, run: dict, overwrite: bool) -> None:
    """Mark `folder` as belonging to this run, unless it is marked so already; UserError if to another."""
    ours = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    marker = folder / RUN
    if overwrite:
        # These two first: without them the rest is not mistaken for a finished folder or a run to resume.
        for path in sorted(ours, key=lambda path: path.name not in (shards.MANIFEST, RUN)):
            path.unlink()
        sync_folder(folder)
    else:
        for path in ours:
            if path.name.endswith(TEMPORARY):
                path.unlink()
        there = read_json(marker) if marker.exists() else None
        if there is None and any(path.exists() for path in ours):
            raise UserError(f"{folder}: holds shards of an unknown run; {ELSEWHERE}")
        if there is not None and there != run:
            keys = ", ".join(key for key in run if there.get(key) != run[key])
            raise UserError(f"{folder}: belongs to another run ({keys} differ); {ELSEWHERE}")
        if there is not None:
            return
    write_json(marker, run)


def preprocess(
    source: str,
    output: str,
    *,
    num_workers: int,
    shard_size: int,
    limit: int | None = None,
    seed: int = 0,
    val_split: float = 0.05,
    val_list: str | None = None,
    keep_near_duplicates: bool = False,
    timeout_s: int = 10,
    memory_mb: int = 1024,
    sustain: bool = False,
    overwrite: bool = False,
) -> None:
    """Run the command; its `--help` describes the arguments.

    Raises:
        UserError: there are no input files, none of them became a song, `val_list` names files that are not
            among them, or `output` belongs to another run.
        OSError: for example, the disk is full; the same call resumes where this one stopped.
    """
    files = in_order(find_files(source), seed, limit)
    named = None if val_list is None else named_files(val_list, source, files)
    run = {
        "version": shards.VERSION,
        "fingerprint": vocab.fingerprint(),
        "input": hash_of_names(files),
        "files": len(files),
        "seed": seed,
        "limit": limit,
        "shard_size": shard_size,
        "val_split": val_split if named is None else 0.0,
        "val_list": None if named is None else hash_of_names(sorted(named)),
        "keep_near_duplicates": keep_near_duplicates,
        "timeout_s": timeout_s,
        "memory_mb": memory_mb,
        "sustain": sustain,
    }
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder, f"{folder}: another preprocess is running there"):
        _claim(folder, run, overwrite)
        count = -(-len(files) // shard_size)
        _run(folder, run, files, count, num_workers, named or frozenset())
        songs = shards.ShardSet(folder)
        damage.check_once(songs, num_workers)
        print_table(songs, _records(folder, count))


def _run(
    folder: Path, run: dict, files: list[str], count: int, num_workers: int, named: frozenset[str]
) -> None:
    seen: set[bytes] = set()
    finished, counts = 0, Counter()
    for record in _records(folder, count, rehash=True):
        index = shards.read_index(folder / record["shard"]["idx"]["name"], run["fingerprint"])
        seen.update(digest.tobytes() for digest in index.digests)
        counts.update(done=record["files"], kept=record["kept"])
        finished += 1

    if finished == count and _is_finished(folder, run):
        print(f"{folder}: is finished already")
    else:
        (folder / shards.MANIFEST).unlink(missing_ok=True)
        if finished < count:
            if finished:
                print(f"{folder}: resumes after {finished} of {count} shards")
            results = run_tasks(
                partial(encode_file, sustain=True) if run["sustain"] else encode_file,
                islice(files, counts["done"], None),
                workers=min(num_workers, len(files) - counts["done"]),
                timeout_s=run["timeout_s"],
                memory_bytes=run["memory_mb"] << 20,
            )
            shown = _with_progress(results, len(files), counts)
            with (
                contextlib.closing(results),
                contextlib.closing(shown),
            ):  # ends the progress bar before an error is printed
                write_shards(folder, shown, len(files), run["shard_size"], finished, seen, named)
        seen.clear()  # near-duplicates are found next, and need memory
        _finish(folder, run, count)


def _is_finished(folder: Path, run: dict) -> bool:
    """Whether a folder whose shards are finished has a manifest, and this and the files it lists are whole.

    What is not is said: it will be written again.
    """
    if not (folder / shards.MANIFEST).exists():
        return False
    try:
        _check_finish(folder, run)
    except UserError as problem:
        print(f"{problem}; it is written again")
        return False
    return True


def _with_progress(results: Iterator[Result], total: int, counts: Counter) -> Iterator[Result]:
    failed = counts["done"] - counts["kept"]
    with tqdm(total=total, initial=counts["done"], unit="file", desc="preprocess", smoothing=0.1) as bar:
        for result in results:
            failed += isinstance(result.failure or result.value, Failure)
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()
            yield result


def _finish(folder: Path, run: dict, count: int) -> None:
    """Write the division, `failed.tsv`, the tokenizer and, last, the manifest."""
    songs, reasons = 0, Counter()
    for record in _records(folder, count):
        songs += record["kept"]
        reasons.update(record["dropped"])
    division = _division(folder, run)
    _write_failures(folder, count, division)
    if not songs:
        reason, times = reasons.most_common(1)[0]
        raise UserError(
            f"none of {run['files']} files became a song ({times} times {reason}: "
            f"{ALL_REASONS.get(reason, reason)}); see {folder / FAILED}"
        )
    write_atomic(folder / shards.DIVISION, division.side.tobytes())
    write_json(folder / shards.TOKENIZER, _tokenizer().to_json())
    write_json(folder / shards.MANIFEST, _manifest(folder, run, division))


def _division(folder: Path, run: dict) -> Division:
    """The division of the songs of all finished shards, by their motifs, `run` and the songs named."""
    lengths, digests, hashes, named = [], [], [], set()
    for record in _records(folder, -(-run["files"] // run["shard_size"])):
        index = shards.read_index(folder / record["shard"]["idx"]["name"], run["fingerprint"])
        lengths.append(np.diff(index.offsets))
        digests.append(index.digests)
        hashes.append(shards.read_motifs(folder / record["shard"]["motifs"]["name"], record["kept"]))
        named.update(bytes.fromhex(digest) for digest in record["named"])
    digests = np.concatenate(digests)
    return divide(
        near_duplicates.clusters(near_duplicates.Motifs(hashes), digests),
        np.concatenate(lengths),
        digests,
        val_split=run["val_split"],
        named=None if run["val_list"] is None else named,
        keep_all=run["keep_near_duplicates"],
    )


def _write_failures(folder: Path, count: int, division: Division) -> None:
    """Write `failed.tsv`: for each shard the files that gave no song, then its near-duplicates left out."""
    left_out = np.flatnonzero(division.side == shards.LEFT_OUT)
    wanted, names, first = {*left_out.tolist(), *division.kept[left_out].tolist()}, {}, 0
    for record in _records(folder, count):
        names.update((first + i, path) for i, path in enumerate(record["paths"]) if first + i in wanted)
        first += record["kept"]
    first = 0
    with atomic_writer(folder / FAILED) as table:
        table.write(b"path\treason\tdetail\n")
        for record in _records(folder, count):
            last = first + record["kept"]
            lefts = left_out[np.searchsorted(left_out, first) : np.searchsorted(left_out, last)].tolist()
            doubles = ((names[song], "near_duplicate", f"of {names[division.kept[song]]}") for song in lefts)
            for failure in (*record["failures"], *doubles):
                table.write(b"\t".join(os.fsencode(_escape(cell)) for cell in failure) + b"\n")
            first = last


def _manifest(folder: Path, run: dict, division: Division) -> dict:
    """The manifest of a folder whose other files are complete, from these files, `run` and the division."""
    count = -(-run["files"] // run["shard_size"])
    entries = [record["shard"] for record in _records(folder, count)]
    return {
        "version": shards.VERSION,
        "fingerprint": vocab.fingerprint(),
        "vocab_size": vocab.VOCAB_SIZE,
        "val_split": run["val_split"],
        "songs": sum(entry["songs"] for entry in entries),
        "tokens": sum(entry["tokens"] for entry in entries),
        "near_duplicates": {
            "clusters": division.clusters,
            "songs": division.clustered,
            "largest_cluster": division.largest,
            "left_out": int(np.count_nonzero(division.side == shards.LEFT_OUT)),
        },
        "run": shards.file_entry(folder / RUN),
        "failed": shards.file_entry(folder / FAILED),
        "division": shards.file_entry(folder / shards.DIVISION),
        "tokenizer": shards.file_entry(folder / shards.TOKENIZER),
        "records": [shards.file_entry(folder / f"{shards.shard_name(i)}.json") for i in range(count)],
        "shards": entries,
    }


def verify(folder: str | os.PathLike) -> shards.ShardSet:
    """Check every byte of a finished folder against its manifest, and the manifest against the run.

    Raises:
        UserError: something is wrong; the message names the first such file.
    """
    songs = damage.verify(folder)
    marker = songs.folder / RUN
    shards.intact_file(songs.folder / shards.MANIFEST, songs.manifest, "run")
    run = read_json(marker)
    if min(shards.field(marker, run, key, int) for key in ("files", "shard_size")) < 1:
        raise UserError(f"{marker}: is damaged")
    shards.field(marker, run, "val_split", (int, float))
    shards.field(marker, run, "val_list", (str, type(None)))
    if type(run.get("keep_near_duplicates")) is not bool:
        raise UserError(f"{marker}: is damaged")
    _check_finish(songs.folder, run)
    return songs


def _check_finish(folder: Path, run: dict) -> None:
    """Raise UserError, which names a file, unless all that `_finish` wrote is as it would write it."""
    source = folder / shards.MANIFEST
    manifest = read_json(source)
    for key in ("run", "failed", "division", "tokenizer"):
        shards.intact_file(source, manifest, key)
    division = _division(folder, run)
    if not np.array_equal(division.side, np.fromfile(folder / shards.DIVISION, np.uint8)):
        raise UserError(f"{folder / shards.DIVISION}: does not agree with the run and the shards")
    expected = _manifest(folder, run, division)
    wrong = [key for key in expected.keys() | manifest.keys() if manifest.get(key) != expected.get(key)]
    if wrong:
        raise UserError(
            f"{source}: does not agree with the run and the shards ({', '.join(sorted(wrong))} differ)"
        )


def _escape(cell: str) -> str:
    for character, escaped in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        cell = cell.replace(character, escaped)
    return cell
