"""What every `python -m meloformer.<command>` shares: flag spelling, one-line errors, exit codes."""

import argparse
import os
import sys
from collections.abc import Callable

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--max-bars` for `--max_bars` (and back), and fails in one line."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._respell(a) for a in args], namespace)

    def _respell(self, arg: str) -> str:
        if not arg.startswith("--"):
            return arg
        name, equals, value = arg.partition("=")
        body = name[2:]
        for spelling in (body, body.replace("-", "_"), body.replace("_", "-")):
            if f"--{spelling}" in self._option_string_actions:
                return f"--{spelling}{equals}{value}"
        return arg

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def fraction(text: str) -> float:
    """An argparse type: a number from 0 up to but not including 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def run(main: Callable[[], None]) -> None:
    """Call `main`, turning a UserError into one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        if os.environ.get("RANK", "0") == "0":  # under torchrun every process meets the same error
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
