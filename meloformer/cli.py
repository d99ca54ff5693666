"""Common to every `python -m meloformer.<command>`: flag spelling, one-line errors, exit codes."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from .errors import UserError
from .streams import outlived_streams


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts `--max-bars` for `--max_bars` and vice versa, with one-line errors."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._respell(a) for a in args], namespace)

    def _respell(self, arg: str) -> str:
        if not arg.startswith("--"):
            return arg
        name, equals, value = arg.partition("=")
        for option in self._option_string_actions:
            if option.replace("_", "-") == name.replace("_", "-"):
                return f"{option}{equals}{value}"
        return arg

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def integer(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if not low <= value <= high:
            bound = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not low <= value <= high:  # nor if it is nan
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return parse


positive_int = integer(1)
seed = integer(0)


def fraction(text: str) -> float:
    """An argparse type: a number from 0 up to but not including 1."""
    value = number(0, 1)(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with the code it returns; a UserError becomes one line and its own code."""
    with outlived_streams():
        try:
            code = main()
        except (UserError, KeyboardInterrupt) as error:
            code = report(error)
    if code:
        sys.exit(code)


def report(error: BaseException) -> int:
    """Print the error that ended a command to stderr, a UserError in one line; returns the exit code."""
    sys.stdout.flush()
    rank = os.environ.get("RANK", "0")  # under torchrun one process may fail and the others not
    if isinstance(error, UserError):
        where = "error" if rank == "0" else f"error in process {rank}"
        # Names of files may hold line breaks and escape sequences of terminals.
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
        # In one write: unbuffered, another process could write between the text and the end of its line.
        print(f"{where}: {text}\n", end="", file=sys.stderr, flush=True)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    text = "".join(traceback.format_exception(error))  # in one piece, since processes share the terminal
    print(text if rank == "0" else f"in process {rank}:\n{text}", file=sys.stderr, flush=True)
    return 1
