"""What the benchmarks over a folder of MIDI files share: their arguments, and where their figures go."""

import argparse
import json
from pathlib import Path

from benchmarks.common.results_file import write
from meloformer import cli


def parse(prog: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    """`folder` and, if the figures are to be kept, `json`."""
    parser = cli.Parser(prog=prog, description=description)
    parser.add_argument("folder", help="folder of MIDI files, or a list file")
    parser.add_argument("--json", type=Path, help="write the figures there, and a page beside it")
    return parser.parse_args(argv)


def publish(result: dict, page: str, path: Path | None) -> None:
    """Print the page; with `path`, write the figures there and the page beside it."""
    print(page)
    if path:
        write(path, json.dumps(result, indent=1) + "\n")
        write(path.with_suffix(".md"), page)
