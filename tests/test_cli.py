import pytest

from meloformer import cli
from meloformer.errors import MidiError, UserError


@pytest.fixture
def parser():
    parser = cli.Parser(prog="tool")
    parser.add_argument("--max_bars", type=cli.positive_int, default=4)
    parser.add_argument("--shard-size", type=cli.positive_int, default=5)
    return parser


@pytest.mark.parametrize(
    "args", [["--max-bars", "7", "--shard_size=9"], ["--max_bars=7", "--shard-size", "9"]]
)
def test_flags_are_taken_with_hyphens_and_underscores(parser, args):
    found = parser.parse_args(args)
    assert (found.max_bars, found.shard_size) == (7, 9)


@pytest.mark.parametrize(
    "args",
    [["--max_bars", "0"], ["--max_bars", "x"], ["--nothing"], ["--max", "3"], ["--max_bars", "9" * 30]],
)
def test_bad_arguments_end_in_one_line_and_code_two(parser, args, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "error, text",
    [
        (UserError("no such folder"), "no such folder"),
        (UserError("a\nb\x1b[2J.mid: é, not a file"), r"a\nb\x1b[2J.mid: é, not a file"),
    ],
    ids=["plain", "name with controls"],
)
def test_a_user_error_ends_in_one_line_and_code_two(error, text, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {text}\n"


def test_a_midi_error_crosses_processes():
    import pickle

    error = pickle.loads(pickle.dumps(MidiError("no_notes", "nothing there")))
    assert (error.reason, error.detail) == ("no_notes", "nothing there")
