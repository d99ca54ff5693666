"""Commands whose standard output or error cannot be written."""

import os
import sys

import pytest

from meloformer import cli
from meloformer.errors import UserError
from meloformer.streams import outlived_streams


@pytest.fixture
def full(monkeypatch):
    """Replaces "stdout" or "stderr" by a file on a full disk."""
    opened = []

    def fill(name: str) -> None:
        opened.append(open("/dev/full", "w"))
        monkeypatch.setattr(sys, name, opened[-1])

    yield fill
    for file in opened:
        file.close()  # fails if it still holds what could not be written


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_full_disk_under_what_is_printed_ends_no_command(full, name, capfd):
    full(name)
    done = []

    def main() -> int:
        for _ in range(3):
            print("x" * 100_000, file=getattr(sys, name), flush=True)
        done.append(True)
        return 75

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert (done, stop.value.code) == ([True], 75)
    told = "standard output cannot be written: No space left on device\n"
    assert capfd.readouterr().err == (told if name == "stdout" else "")


def test_a_reader_that_has_gone_ends_no_command(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        cli.run(lambda: print("a line that `head` did not want", flush=True))
    assert capfd.readouterr().err == ""


def test_an_error_keeps_its_code_where_it_cannot_be_told(full):
    full("stderr")

    def main():
        raise UserError("nobody reads this")

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2


def test_closed_streams_end_no_command(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # what Python has after `>&-`
    with outlived_streams():
        print("nowhere", flush=True)
        assert not sys.stderr.isatty()
    assert sys.stdout is None
