"""`python -m meloformer.preprocess`: MIDI files -> shards of tokens.

Does not import torch, which would cost every worker process memory and time.
"""

import argparse
import os

from . import cli
from .data.build import preprocess, verify
from .errors import UserError
from .files import require_locks

VAL_SPLIT = 0.05


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m meloformer.preprocess", description="Turn MIDI files into shards.")
    add = parser.add_argument
    add("--input", metavar="LIST_OR_FOLDER", help="a folder, or a text file with one path per line")
    add("--output", metavar="DIR", help="folder for the shards; to resume, run the same command")
    add("--workers", type=cli.integer(1, 10_000), default=os.cpu_count() or 1, help="worker processes")
    add("--shard-size", type=cli.positive_int, default=10_000, help="input files per shard")
    add("--limit", type=cli.positive_int, help="use only this many files, chosen at random by --seed")
    add("--seed", type=cli.seed, default=0, help="random seed of the order of the files")
    add("--val-split", type=cli.fraction, help=f"fraction for validation (default: {VAL_SPLIT})")
    add(
        "--val-list",
        metavar="FILE",
        help="instead of --val-split: a text file that names the validation songs, one path per line",
    )
    add(
        "--keep-near-duplicates",
        action="store_true",
        help="keep songs that share most of their bars with another song",
    )
    add("--timeout", type=cli.integer(1, 86_400), default=10, help="limit of seconds per file")
    add("--memory-mb", type=cli.integer(1, 2**30), default=1024, help="limit of MiB per file (Linux only)")
    add("--sustain", action="store_true", help="let notes sound on while the sustain pedal is down")
    add("--overwrite", action="store_true", help="start again: delete the files of earlier runs in --output")
    add("--verify", metavar="DIR", help="only check every byte and every song of a finished folder")
    args = parser.parse_args(argv)
    if args.val_list is not None and args.val_split is not None:
        parser.error("--val_list and --val_split cannot be combined")
    args.val_split = VAL_SPLIT if args.val_split is None else args.val_split
    if args.verify and (args.input or args.output):
        parser.error("--verify cannot be combined with --input or --output")
    if not args.verify and not (args.input and args.output):
        parser.error("--input and --output are required (or --verify DIR)")
    return args


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    if not args.verify:
        require_locks()
    try:
        if args.verify:
            songs = verify(args.verify)
            tokens = int(songs.lengths.sum())
            print(f"{args.verify}: {len(songs):,} songs, {tokens:,} tokens, no error found")
            return
        preprocess(
            args.input,
            args.output,
            num_workers=args.workers,
            shard_size=args.shard_size,
            limit=args.limit,
            seed=args.seed,
            val_split=args.val_split,
            val_list=args.val_list,
            keep_near_duplicates=args.keep_near_duplicates,
            timeout_s=args.timeout,
            memory_mb=args.memory_mb,
            sustain=args.sustain,
            overwrite=args.overwrite,
        )
    except OSError as error:  # a full disk, no permission: reported in one line
        raise UserError(f"{error.filename or args.output}: {error.strerror or error}") from error


if __name__ == "__main__":
    cli.run(main)
