"""`python -m benchmarks.preprocess FOLDER`: the memory that preprocess takes, and its speed (Linux)."""

import multiprocessing
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import miditoolkit
import numpy as np
from tqdm import tqdm

from benchmarks.common import folder_report
from benchmarks.common.machine import describe, provenance
from meloformer import cli
from meloformer.data import build
from meloformer.data.inputs import find_files
from meloformer.data.workers import Failure, Result
from meloformer.errors import UserError
from meloformer.tokens import grammar, vocab

# The larger one lies just beyond a doubling of the set of digests: memory per file is at its worst there.
FEW, MANY = 10_000, 315_000
PATH = "/data/collections/lakh-full/{group:02x}/{number:032x}.mid"


def _peak_mib(files: int, connection) -> None:
    """In a fresh process: peak resident memory of a run over made-up files, each of them a song."""

    def run_tasks(function, items, **_):
        for i, path in enumerate(items):
            ids = np.full(8, vocab.P.start, np.uint16)
            ids[:2] = i % 65536, i // 65536
            yield Result(path, (ids, 1, []))

    build.run_tasks = run_tasks
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "names.txt"
        with open(names, "w") as file:
            for i in range(files):
                file.write(PATH.format(group=i % 256, number=i) + "\n")
        build.preprocess(str(names), f"{folder}/data", num_workers=1, shard_size=10_000)
    # Not ru_maxrss: that one begins with the parent's.
    connection.send(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)


def memory() -> dict[str, float]:
    """Memory of the parent process: MiB with few files, and bytes for each further one."""
    peaks = []
    for files in (FEW, MANY):
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_peak_mib, args=(files, there))
        process.start()
        there.close()
        peaks.append(here.recv())
        process.join()
    return {
        "characters_per_path": len(PATH.format(group=0, number=0)),
        "few_files": FEW,
        "many_files": MANY,
        "mib_with_few_files": peaks[0],
        "bytes_per_further_file": (peaks[1] - peaks[0]) * 2**20 / (MANY - FEW),
    }


def speed(folder: str) -> dict[str, float]:
    """Encoding on one core: all of it, and next to it what miditoolkit takes to parse the same files.

    Files that miditoolkit by itself cannot read are left out.
    """
    seconds, songs, tokens = Counter(), 0, []
    for path in tqdm(find_files(folder), unit="file"):
        Path(path).read_bytes()  # now neither reading comes from the disk
        started = time.process_time()
        result = build.encode_file(path)
        encoded = time.process_time()
        if isinstance(result, Failure):
            continue
        try:
            miditoolkit.MidiFile(path)
        except Exception:  # it raises what it likes on files that our reader mends: nothing to compare
            continue
        parsed = time.process_time()
        grammar.check(result[0])
        checked = time.process_time()
        songs += 1
        tokens.append(len(result[0]))
        seconds.update(encode=encoded - started, parse=parsed - encoded, check=checked - parsed)
    if not songs:
        raise UserError(f"{folder}: no file could be read")
    return {
        "songs": songs,
        "tokens_per_song": sum(tokens) / songs,
        "files_per_s_and_core": songs / seconds["encode"],
        "files_per_s_of_miditoolkits_parse_alone": songs / seconds["parse"],
        "ms_per_file_beyond_the_parse": 1e3 * (seconds["encode"] - seconds["parse"]) / songs,
        "tokens_per_s_of_verify": sum(tokens) / seconds["check"],
    }


def page(result: dict) -> str:
    """The figures as a Markdown page."""
    memory, speed = result["memory"], result["speed"]
    return (
        "# What preprocess takes\n\n"
        "| figure | value |\n|---|---|\n"
        f"| parent process, {memory['few_files']:,} files | {memory['mib_with_few_files']:.0f} MiB |\n"
        f"| each further file, up to {memory['many_files']:,}, paths of {memory['characters_per_path']} "
        f"characters | {memory['bytes_per_further_file']:.0f} bytes |\n"
        f"| files per second and core ({speed['songs']} real songs, {speed['tokens_per_song']:,.0f} tokens "
        f"in the mean) | {speed['files_per_s_and_core']:.1f} |\n"
        "| the same if miditoolkit only parsed them | "
        f"{speed['files_per_s_of_miditoolkits_parse_alone']:.1f} |\n"
        f"| beyond that parse | {speed['ms_per_file_beyond_the_parse']:.1f} ms per file |\n"
        f"| `--verify`, tokens per second | {speed['tokens_per_s_of_verify']:,.0f} |\n\n"
        "Memory is peak resident memory of the whole process: Python, libraries, all that the run keeps. "
        f"Made by `python -m benchmarks.preprocess FOLDER --json FILE` on "
        f"{provenance(result['machine'])}.\n"
    )


def main(argv: list[str] | None = None) -> None:
    args = folder_report.parse("python -m benchmarks.preprocess", __doc__.splitlines()[0], argv)
    result = {"memory": memory(), "speed": speed(args.folder)}
    result["machine"] = describe()  # last, since it imports torch
    folder_report.publish(result, page(result), args.json)


if __name__ == "__main__":
    cli.run(main)
