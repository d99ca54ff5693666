"""`python -m meloformer.preprocess`: MIDI files -> shards of tokens.

Free of torch, which would take memory and time to import.
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
    add("--input", metavar="LIST_OR_FOLDER", help="a text file with one path per line, or a folder")
    add("--output", metavar="DIR", help="where the shards go; the same command resumes there")
    add("--workers", type=cli.integer(1, 10_000), default=os.cpu_count() or 1, help="processes")
    add("--shard-size", type=cli.positive_int, default=10_000, help="input files per shard")
    add("--limit", type=cli.positive_int, help="use only so many files, drawn by --seed")
    add("--seed", type=cli.seed, default=0, help="of the order of the files")
    add("--val-split", type=cli.fraction, help=f"share of songs for validation (default: {VAL_SPLIT})")
    add(
        "--val-list",
        metavar="FILE",
        help="instead: a text file that names the validation songs, a path per line",
    )
    add(
        "--keep-near-duplicates",
        action="store_true",
        help="do not leave out songs that share most bars with another",
    )
    add("--timeout", type=cli.integer(1, 86_400), default=10, help="seconds per file")
    add("--memory-mb", type=cli.integer(1, 2**30), default=1024, help="MiB per file (enforced on Linux)")
    add("--sustain", action="store_true", help="let notes sound on while the sustain pedal is down")
    add("--overwrite", action="store_true", help="start anew: delete what earlier runs left in --output")
    add("--verify", metavar="DIR", help="check every byte of a finished folder, and every song")
    args = parser.parse_args(argv)
    if args.val_list is not None and args.val_split is not None:
        parser.error("--val_list goes without --val_split")
    args.val_split = VAL_SPLIT if args.val_split is None else args.val_split
    if args.verify and (args.input or args.output):
        parser.error("--verify goes without --input and --output")
    if not args.verify and not (args.input and args.output):
        parser.error("--input and --output are needed (or --verify DIR)")
    return args


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    if not args.verify:
        require_locks()
    try:
        if args.verify:
            songs = verify(args.verify)
            tokens = int(songs.lengths.sum())
            print(f"{args.verify}: {len(songs):,} songs, {tokens:,} tokens, all as written")
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
    except OSError as error:  # a full disk, no permission: told in one line
        raise UserError(f"{error.filename or args.output}: {error.strerror or error}") from error


if __name__ == "__main__":
    cli.run(main)
