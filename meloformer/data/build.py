"""MIDI files -> shards of tokens. What it promises is in docs/data.md.

Worker processes import this module, so it must stay free of torch.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import MidiError, UserError
from ..files import TEMPORARY, atomic_writer, exclusive_lock, read_json, sync_folder, write_json
from ..midi.reader import MENDS, REASONS
from ..tokens import vocab
from ..tokens.tokenizer import HIDTokenizer
from . import shards, workers
from .inputs import find_files, hash_of_names, in_order
from .workers import Failure, Result, run_tasks

RUN = "run.json"
FAILED = "failed.tsv"
ELSEWHERE = "use another --output, or --overwrite to delete what is there"
ALL_REASONS = {**REASONS, **workers.REASONS, "duplicate": "same tokens as an earlier file"}

_OURS = re.compile(
    rf"(shard-\d{{5,}}\.(bin|idx|json)|{shards.MANIFEST}|{shards.TOKENIZER}|{RUN}|{FAILED})"
    rf"({re.escape(TEMPORARY)})?"
)


# --- one file: in a worker process ----------------------------------------------------------------


@cache
def _tokenizer() -> HIDTokenizer:
    return HIDTokenizer()


def encode_file(path: str, sustain: bool = False) -> tuple[np.ndarray, int, list[str]] | Failure:
    """Token ids (uint16 [n]), bars and mend codes of a MIDI file, or why it is refused."""
    try:
        ids, mends = _tokenizer().encode_with_mends(path, sustain=sustain)
    except MidiError as error:
        return Failure(error.reason, error.detail)
    return ids, int(np.count_nonzero(vocab.CHORD.mask(ids))), sorted(mends)


# --- all files: in the parent ---------------------------------------------------------------------


def write_shards(
    folder: Path, results: Iterable[Result], total: int, shard_size: int, finished: int, seen: set[bytes]
) -> None:
    """Write shards `finished`, `finished` + 1, ...: shard k holds files k * shard_size and after.

    Args:
        results: what `encode_file` made of files `finished * shard_size` .. `total` - 1, in order.
        seen: digests of the songs that are there already; the new ones are added.
    """
    results = iter(results)
    for number in range(finished, -(-total // shard_size)):
        files = min(shard_size, total - number * shard_size)
        kept, mends, failures = 0, Counter(), []
        with shards.ShardWriter(folder, number, vocab.fingerprint()) as writer:
            for result in islice(results, files):
                value = result.failure or result.value
                if not isinstance(value, Failure):
                    ids, bars, mended = value
                    digest = shards.content_digest(ids)
                    if digest not in seen:
                        seen.add(digest)
                        writer.add(ids, bars, digest)
                        kept += 1
                        mends.update(mended)
                        continue
                    value = Failure("duplicate", f"its tokens have the digest {digest.hex()}")
                failures.append([result.item, value.reason, value.detail])
            dropped = Counter(reason for _, reason, _ in failures)
            writer.finish(
                {
                    "files": files,
                    "kept": kept,
                    "dropped": dict(dropped),
                    "mends": dict(mends),
                    "failures": failures,
                }
            )


def _records(folder: Path, count: int, *, rehash: bool = False) -> Iterator[dict]:
    """Completion records of shards 0, 1, ..., up to the first that is not finished."""
    for number in range(count):
        record = shards.read_record(folder, number, rehash=rehash)
        if record is None:
            return
        _check_report(folder / f"{shards.shard_name(number)}.json", record)
        yield record


def _check_report(source: Path, record: dict) -> None:
    """UserError if the counts in a completion record are missing or contradict each other."""
    files, kept = (shards.field(source, record, key, int) for key in ("files", "kept"))
    dropped, mends = (shards.field(source, record, key, dict) for key in ("dropped", "mends"))
    failures = shards.field(source, record, "failures", list)
    for cells in failures:
        if not (isinstance(cells, list) and [type(cell) for cell in cells] == [str] * 3):
            raise UserError(f"{source}: its list of failures is damaged")
    agree = (
        kept == record["shard"]["songs"]
        and files == kept + len(failures)
        and dropped == Counter(reason for _, reason, _ in failures)
        and all(type(times) is int for times in mends.values())
    )
    if not agree:
        raise UserError(f"{source}: its counts are damaged")


def _claim(folder: Path, run: dict, overwrite: bool) -> None:
    """Make `folder` belong to this run, or to the same one that was broken off."""
    ours = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    marker = folder / RUN
    if overwrite:
        # These two first: without them, nobody takes what is left for a finished folder, or resumes it.
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
    timeout_s: int = 10,
    memory_mb: int = 1024,
    sustain: bool = False,
    overwrite: bool = False,
) -> None:
    """What the command does; see `--help` for the arguments.

    Raises:
        UserError: the input names no files, none of them became a song, or `output` is taken.
        OSError: the disk is full, or the like; the same call goes on where it stopped.
    """
    files = in_order(find_files(source), seed, limit)
    run = {
        "version": shards.VERSION,
        "fingerprint": vocab.fingerprint(),
        "input": hash_of_names(files),
        "files": len(files),
        "seed": seed,
        "limit": limit,
        "shard_size": shard_size,
        "val_split": val_split,
        "timeout_s": timeout_s,
        "memory_mb": memory_mb,
        "sustain": sustain,
    }
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder, f"{folder}: another preprocess is running there"):
        _claim(folder, run, overwrite)
        count = -(-len(files) // shard_size)
        _run(folder, run, files, count, num_workers)
        print_table(folder, count)


def _run(folder: Path, run: dict, files: list[str], count: int, num_workers: int) -> None:
    seen: set[bytes] = set()
    finished, counts = 0, Counter()
    for record in _records(folder, count, rehash=True):
        index = shards.read_index(folder / record["shard"]["idx"]["name"], run["fingerprint"])
        seen.update(digest.tobytes() for digest in index.digests)
        counts.update(done=record["files"], kept=record["kept"])
        finished += 1

    if finished == count and (folder / shards.MANIFEST).exists():
        print(f"{folder}: is finished already")
    else:
        (folder / shards.MANIFEST).unlink(missing_ok=True)
        if finished < count:
            if finished:
                print(f"{folder}: goes on after {finished} of {count} shards")
            results = run_tasks(
                partial(encode_file, sustain=True) if run["sustain"] else encode_file,
                islice(files, counts["done"], None),
                workers=min(num_workers, len(files) - counts["done"]),
                timeout_s=run["timeout_s"],
                memory_bytes=run["memory_mb"] << 20,
            )
            shown = _with_progress(results, len(files), counts)
            with contextlib.closing(results), contextlib.closing(shown):  # the bar ends before an error shows
                write_shards(folder, shown, len(files), run["shard_size"], finished, seen)
        _finish(folder, run, count)


def _with_progress(results: Iterator[Result], total: int, counts: Counter) -> Iterator[Result]:
    failed = counts["done"] - counts["kept"]
    with tqdm(total=total, initial=counts["done"], unit="file", desc="preprocess", smoothing=0.1) as bar:
        for result in results:
            failed += isinstance(result.failure or result.value, Failure)
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()
            yield result


def _finish(folder: Path, run: dict, count: int) -> None:
    """Write `failed.tsv`, the tokenizer and, last, the manifest."""
    songs, reasons = 0, Counter()
    with atomic_writer(folder / FAILED) as table:
        table.write(b"path\treason\tdetail\n")
        for record in _records(folder, count):
            songs += record["kept"]
            reasons.update(record["dropped"])
            for failure in record["failures"]:
                table.write(b"\t".join(os.fsencode(_escape(cell)) for cell in failure) + b"\n")
    if not songs:
        reason, times = reasons.most_common(1)[0]
        raise UserError(
            f"none of {run['files']} files became a song ({times} times {reason}: "
            f"{ALL_REASONS.get(reason, reason)}); see {folder / FAILED}"
        )
    write_json(folder / shards.TOKENIZER, _tokenizer().to_json())
    write_json(folder / shards.MANIFEST, _manifest(folder, run))


def _manifest(folder: Path, run: dict) -> dict:
    """The manifest of a folder whose other files are all there, made from them and from `run`."""
    count = -(-run["files"] // run["shard_size"])
    entries = [record["shard"] for record in _records(folder, count)]
    return {
        "version": shards.VERSION,
        "fingerprint": vocab.fingerprint(),
        "vocab_size": vocab.VOCAB_SIZE,
        "val_split": run["val_split"],
        "songs": sum(entry["songs"] for entry in entries),
        "tokens": sum(entry["tokens"] for entry in entries),
        "run": shards.file_entry(folder / RUN),
        "failed": shards.file_entry(folder / FAILED),
        "tokenizer": shards.file_entry(folder / shards.TOKENIZER),
        "records": [shards.file_entry(folder / f"{shards.shard_name(i)}.json") for i in range(count)],
        "shards": entries,
    }


def verify(folder: str | os.PathLike) -> shards.ShardSet:
    """Compare every byte of a finished folder with its manifest, and the manifest with the run.

    Raises:
        UserError: the first thing found wrong, with the name of its file.
    """
    songs = shards.verify(folder)
    source, marker = songs.folder / shards.MANIFEST, songs.folder / RUN
    shards.intact_file(source, songs.manifest, "failed")
    shards.intact_file(source, songs.manifest, "run")
    run = read_json(marker)
    if min(shards.field(marker, run, key, int) for key in ("files", "shard_size")) < 1:
        raise UserError(f"{marker}: is damaged")
    shards.field(marker, run, "val_split", (int, float))
    expected = _manifest(songs.folder, run)
    wrong = [key for key in expected if songs.manifest.get(key) != expected[key]]
    if wrong:
        raise UserError(f"{source}: does not agree with the run and the shards ({', '.join(wrong)} differ)")
    return songs


def _escape(cell: str) -> str:
    for character, escaped in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        cell = cell.replace(character, escaped)
    return cell


def print_table(folder: Path, count: int) -> None:
    """The summary of a finished folder, from its records and indexes."""
    songs = shards.ShardSet(folder)
    totals, dropped, mends = Counter(), Counter(), Counter()
    for record in _records(folder, count):
        totals.update(files=record["files"], kept=record["kept"])
        dropped.update(record["dropped"])
        mends.update(record["mends"])
    _line("files", totals["files"])
    _line("kept", totals["kept"])
    _line("dropped", sum(dropped.values()))
    for reason, times in sorted(dropped.items(), key=lambda item: (-item[1], item[0])):
        _line(f"  {reason}", times, ALL_REASONS.get(reason, ""))
    if mends:
        _line("files mended with", "")
    for code, times in sorted(mends.items(), key=lambda item: (-item[1], item[0])):
        _line(f"  {code}", times, MENDS.get(code, ""))
    _line("train songs", len(songs.split("train")))
    _line("val songs", len(songs.split("val")))
    _line("tokens", int(songs.lengths.sum()))
    percentiles = (0, 5, 25, 50, 75, 95, 100)
    print(f"{'percentile':<16}" + "".join(f"{p:>9}" for p in percentiles))
    for name, values in (("tokens per song", songs.lengths), ("bars per song", songs.bars)):
        print(f"{name:<16}" + "".join(f"{v:>9,.0f}" for v in np.percentile(values, percentiles)))


def _line(label: str, number: int | str, text: str = "") -> None:
    print(f"{label:<24}{number:>13,}  {text}".rstrip() if number != "" else label)


# --- the command ----------------------------------------------------------------------------------
