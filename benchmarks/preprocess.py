"""`python -m benchmarks.preprocess FOLDER`: the memory that preprocess takes, and its speed (Linux)."""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import miditoolkit
import numpy as np
from tqdm import tqdm

from benchmarks.common import folder_report
from benchmarks.common.machine import describe, provenance
from benchmarks.common.markdown import table
from meloformer import cli
from meloformer.data import build
from meloformer.data.inputs import find_files
from meloformer.data.workers import Failure, Result
from meloformer.errors import UserError
from meloformer.tokens import grammar, vocab

# The larger one lies just beyond a doubling of the set of digests: memory per file is at its worst there.
FEW, MANY = 10_000, 315_000
MOTIFS = 170  # as many as a real song has in the mean
PATH = "/data/collections/lakh-full/{group:02x}/{number:032x}.mid"


def _peak_mib(files: int, connection) -> None:
    """In a fresh process: peak resident memory of a run over made-up files, each of them a song."""

    generator = np.random.default_rng(0)

    def run_tasks(function, items, **_):
        for i, path in enumerate(items):
            ids = np.full(8, vocab.P.start, np.uint16)
            ids[:2] = i % 65536, i // 65536
            motifs = np.sort(generator.integers(0, 2**64, MOTIFS, np.uint64))
            yield Result(path, build.Encoded(ids, 1, [], motifs))

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


class OtherCheckout:
    """`encode_file` of another checkout of this repository, in a process of its own."""

    _SERVER = """
import sys, time
from meloformer.data.build import encode_file
for line in sys.stdin:
    started = time.process_time()
    encode_file(line[:-1])
    print(time.process_time() - started, flush=True)
"""

    def __init__(self, folder: str):
        git = ["git", "-C", folder, "rev-parse", "HEAD"]
        self.commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        if not self.commit or not Path(folder, "meloformer", "data", "build.py").is_file():
            raise UserError(f"{folder}: is not a checkout of this repository with meloformer/data/build.py")
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._SERVER],
            cwd=folder,  # first in the path of the process, before what is installed
            env={**os.environ, "PYTHONPATH": str(Path(folder).resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, path: str) -> float:
        """CPU time that it takes for a file."""
        self._process.stdin.write(f"{os.path.abspath(path)}\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise UserError(f"the other checkout failed on {path}")
        return float(answer)


def speed(folder: str, other: OtherCheckout | None) -> dict[str, float | str]:
    """Encoding on one core, in CPU time: here, in another checkout, and what miditoolkit takes to parse.

    Each file is read by all of them in turn. Those that miditoolkit by itself cannot read are left out.
    """
    seconds, songs, tokens = Counter(), 0, []
    for path in tqdm(find_files(folder), unit="file"):
        Path(path).read_bytes()  # now no reading comes from the disk
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
        if other:
            seconds["other"] += other.seconds(path)
    if not songs:
        raise UserError(f"{folder}: no file could be read")
    figures = {
        "folder": Path(folder).name,
        "songs": songs,
        "tokens_per_song": sum(tokens) / songs,
        "files_per_s_and_core": songs / seconds["encode"],
        "files_per_s_of_miditoolkits_parse_alone": songs / seconds["parse"],
        "tokens_per_s_of_verify": sum(tokens) / seconds["check"],
    }
    if other:
        figures["other_commit"] = other.commit
        figures["files_per_s_of_the_other"] = songs / seconds["other"]
    return figures


def page(result: dict) -> str:
    """The figures as a Markdown page."""
    memory, speeds = result["memory"], result["speed"]
    has_other = all("other_commit" in row for row in speeds)
    head = ["files", "songs", "tokens a song", "files/s", "miditoolkit's parse alone, files/s"]
    rows = [
        [
            row["folder"],
            f"{row['songs']:,}",
            f"{row['tokens_per_song']:,.0f}",
            f"{row['files_per_s_and_core']:.1f}",
            f"{row['files_per_s_of_miditoolkits_parse_alone']:.1f}",
        ]
        for row in speeds
    ]
    if has_other:
        head += [f"at {speeds[0]['other_commit'][:7]}, files/s", "times as fast"]
        for cells, row in zip(rows, speeds):
            there = row["files_per_s_of_the_other"]
            cells += [f"{there:.1f}", f"{row['files_per_s_and_core'] / there:.2f}"]
    checked = max(row["tokens_per_s_of_verify"] for row in speeds)
    return (
        "# What preprocess takes\n\n"
        f"Encoding on one core, by CPU time, each file by all programs in turn:\n\n{table(head, rows)}\n"
        f"`--verify` checks {checked:,.0f} tokens per second.\n\n"
        f"Memory of the parent process: {memory['mib_with_few_files']:.0f} MiB with "
        f"{memory['few_files']:,} files, {memory['bytes_per_further_file']:.0f} bytes for each further one "
        f"(up to {memory['many_files']:,}, with paths of {memory['characters_per_path']} characters): peak "
        "resident memory of the whole process with Python, libraries and all that the run keeps. Most of the "
        "bytes per file are mapped pages of the motif files, which the system can take back.\n\n"
        "Made by `python -m benchmarks.preprocess FOLDER... --json FILE` on "
        f"{provenance(result['machine'])}.\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.preprocess", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder of MIDI files, or a list file")
    parser.add_argument("--against", metavar="CHECKOUT", help="also time this other checkout, file by file")
    parser.add_argument("--json", type=Path, help="write the figures to this file, and a page beside it")
    args = parser.parse_args(argv)
    other = OtherCheckout(args.against) if args.against else None
    result = {"speed": [speed(folder, other) for folder in args.folders], "memory": memory()}
    result["machine"] = describe()  # last, since it imports torch
    folder_report.publish(result, page(result), args.json)


if __name__ == "__main__":
    cli.run(main)
