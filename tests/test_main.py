"""`meloformer COMMAND`: the same commands under one name."""

import importlib
import os
import subprocess
import sys

import pytest

from meloformer import __main__ as command
from meloformer import __version__


def test_every_command_is_there_and_has_a_main():
    for name in command.COMMANDS:
        assert callable(importlib.import_module(f"meloformer.{name}").main)


def test_version_and_help(capsys):
    for flag, says in (
        ("--version", f"meloformer {__version__}\n"),
        ("--help", "  generate    write a new song"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main([flag])
        assert stop.value.code == 0 and says in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["trian"], ["--nothing"]])
def test_a_wrong_command_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_rest_goes_to_the_command(tmp_path):
    """And only what it needs is imported."""
    code = (
        "import sys; from meloformer.__main__ import main\n"
        f"main(['compose', '--output', {str(tmp_path / 'songs')!r}, '--count', '1'])\n"
        "print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n") and len(list((tmp_path / "songs").iterdir())) == 1
