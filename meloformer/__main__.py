"""`meloformer COMMAND ...`, the same as `python -m meloformer.COMMAND ...`."""

import argparse
import importlib
import sys

from . import __version__, cli

# In the order of use. They are imported when they are called: `preprocess` does without torch.
COMMANDS = {
    "preprocess": "MIDI files to token shards",
    "train": "train a model on them",
    "generate": "write a new song, or go on with a given one",
    "export": "copy a checkpoint without the training state",
    "demo": "every step from MIDI files to a new song, in a few minutes",
    "compose": "songs by a small procedural composer, to try things with",
}


def main(argv: list[str] | None = None) -> int | None:
    """Run the command that `argv` (without the name of the program) names."""
    argv = sys.argv[1:] if argv is None else argv
    listed = "\n".join(f"  {name:<11} {what}" for name, what in COMMANDS.items())
    parser = cli.Parser(
        prog="meloformer",
        usage="meloformer COMMAND [FLAGS]",
        description="Learns from MIDI files to write whole songs.",
        epilog=f"commands (each explains its flags with --help):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of the epilog
    )
    parser.add_argument("--version", action="version", version=f"meloformer {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    name = parser.parse_args(argv[:1]).command
    return importlib.import_module(f".{name}", __package__).main(argv[1:])


def entry_point() -> None:
    """What the installed command `meloformer` runs."""
    cli.run(main)


if __name__ == "__main__":
    entry_point()
