"""`python -m benchmarks.loader DATA_DIR`: what a batch costs the loader, and what augmentation adds to it."""

import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import folder_report
from benchmarks.common.machine import describe, provenance
from benchmarks.common.markdown import table
from meloformer import cli
from meloformer.data import augment
from meloformer.data.augment import Augmentation
from meloformer.data.batches import PackedSongs
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.training.config import TrainConfig

ROWS = ((24576, 4), (8192, 4), (2048, 4))  # tokens a row and rows a batch; the first are train's defaults
ON = TrainConfig(data_dir="").augmentation


def _seconds(songs: PackedSongs, epoch: int, rows: range) -> float:
    started = time.process_time()
    songs.batch(epoch, rows)
    return time.process_time() - started


def measure(shards: ShardSet, tokens: int, rows: int, batches: int, pairs: int, on: Augmentation) -> dict:
    """CPU time of the same batches without and with augmentation, in turn, in this process.

    Raises:
        UserError: there are too few songs for one batch.
    """
    plain, changed = (
        PackedSongs(shards, "train", max_seq_len=tokens, max_bars=TrainConfig.max_bars, augmentation=settings)
        for settings in (augment.OFF, on)
    )
    batches = min(batches, plain.rows_per_epoch(0) // rows)
    if not batches:
        raise UserError(f"{shards.folder}: has not enough songs for {rows} rows of {tokens} tokens")
    numbers = [range(i * rows, (i + 1) * rows) for i in range(batches)]
    held = sum(plain.batch(0, of_batch).tokens for of_batch in numbers)
    # The first reading of a sample counts its pairs and finds which changes fit it; `plain` has read them.
    first = sum(_seconds(changed, 0, of_batch) for of_batch in numbers)
    seconds = np.array(
        [
            [[_seconds(songs, 0, of_batch) for songs in (plain, changed)] for of_batch in numbers]
            for _ in range(pairs)
        ]
    )  # [pairs, batches, 2]
    off, with_changes = seconds.sum(axis=1).T / held * 1e9
    added = (with_changes / off - 1) * 100
    # What else runs on the machine only adds time, so the least of every batch is nearest to what it takes.
    least_off, least_on = seconds.min(axis=0).sum(axis=0) / held * 1e9
    return {
        "tokens_per_row": tokens,
        "rows": rows,
        "batches": batches,
        "tokens": held,
        "pairs": pairs,
        "us_per_1000_tokens": {"median": float(np.median(off)), "least": float(least_off)},
        "us_per_1000_tokens_augmented": {"median": float(np.median(with_changes)), "least": float(least_on)},
        "us_per_1000_tokens_first_read_augmented": first / held * 1e9,
        "percent_added": {
            "least": float((least_on / least_off - 1) * 100),
            **dict(zip(("q25", "median", "q75"), np.quantile(added, (0.25, 0.5, 0.75)).tolist())),
        },
    }


def page(result: dict) -> str:
    """The figures as a Markdown page."""
    head = ["row", "off, µs", "on, µs", "added, µs", "added", "median of pairs (quarter to three quarters)"]
    rows = []
    for row in result["rows"]:
        off, on = (row[key]["least"] for key in ("us_per_1000_tokens", "us_per_1000_tokens_augmented"))
        added = row["percent_added"]
        rows.append(
            [
                f"{row['rows']} x {row['tokens_per_row']:,}",
                f"{off:.1f}",
                f"{on:.1f}",
                f"{on - off:.1f}",
                f"{added['least']:.1f} %",
                f"{added['median']:.1f} % ({added['q25']:.1f} to {added['q75']:.1f})",
            ]
        )
    return (
        "# What augmentation costs the loader\n\n"
        "CPU time per 1,000 tokens of all that makes a batch, `PackedSongs.batch`: reading its songs (from "
        "the page cache), the scan for attributes, ids, targets and the structure of attention. Samples have "
        "been read before, so that their pairs are counted. The same batches are made without and with "
        "augmentation (as the flags have it by default), in turn, by one thread. The figures are the least "
        f"of each batch over {result['rows'][0]['pairs']} turns, which other work on the machine disturbs "
        "least.\n\n"
        f"{table(head, rows)}\n"
        "Made by `python -m benchmarks.loader DATA_DIR --json FILE` on "
        f"{provenance(result['machine'])}.\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", help="folder that preprocess wrote")
    parser.add_argument("--batches", type=cli.positive_int, default=6, help="batches of each kind of row")
    parser.add_argument("--pairs", type=cli.positive_int, default=30, help="how often each batch is made")
    parser.add_argument("--json", type=Path, help="write the figures to this file, and a page beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shards = ShardSet(args.data_dir)
    rows = [measure(shards, tokens, of, args.batches, args.pairs, ON) for tokens, of in ROWS]
    result = {"machine": describe(), "rows": rows}
    folder_report.publish(result, page(result), args.json)


if __name__ == "__main__":
    cli.run(main)
