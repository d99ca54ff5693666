"""What benchmarks over a folder of MIDI files share: command-line arguments, and writing the results."""

import argparse
import json
from pathlib import Path

from benchmarks.common.results_file import write
from meloformer import cli


def parse(prog: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    """Arguments `folder` and `json`."""
    parser = cli.Parser(prog=prog, description=description)
    parser.add_argument("folder", help="folder of MIDI files, or a list file")
    parser.add_argument("--json", type=Path, help="write the figures to this file, and a page beside it")
    return parser.parse_args(argv)


def publish(result: dict, page: str, path: Path | None) -> None:
    """Prints the page; with `path`, writes the figures there and the page beside it."""
    print(page)
    if path:
        write(path, json.dumps(result, indent=1) + "\n")
        write(path.with_suffix(".md"), page)
