"""A checkpoint that may not be read: one line that names the file."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from meloformer import export, generate
from meloformer.errors import UserError
from meloformer.training.distributed import start_job
from meloformer.training.resume import load_for_resume

from helpers.training import config
from helpers.untrained import save_untrained

NOBODY = 65534
FOLDERS = ("run", "run/checkpoints", "run/checkpoints/step-00000001")
FILES = [f"{FOLDERS[-1]}/{name}" for name in ("manifest.json", "trainer.json", "model.safetensors")]

COMMANDS = ("generate", "export", "export --best", "train --resume")
CASES = [(command, name) for command in COMMANDS for name in (*FOLDERS, *FILES)]
CASES += [
    ("train", name) for name in FOLDERS[:2]
]  # where a checkpoint is, whatever is in it, nothing is begun


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with the output of a run, in the eyes of a user who is not root, whom no mode keeps out."""
    folder = Path(tempfile.mkdtemp())  # what pytest makes, its owner alone may enter
    save_untrained(folder / "run" / "checkpoints", 64, val_loss=1.0)
    (folder / "new").mkdir()
    (folder / "new").chmod(0o777)
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


def deny(path: Path) -> None:
    """Take all rights to a file or folder from the user of `place`."""
    user = os.geteuid()
    try:
        if user == NOBODY:
            os.seteuid(0)
        path.chmod(0)
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
@pytest.mark.parametrize("command, name", CASES, ids=lambda text: text.split("/")[-1])
def test_what_may_not_be_read_is_named(place, command, name):
    deny(place / name)
    given, new = str(place / "run"), place / "new"
    with pytest.raises(UserError) as error:
        if command == "generate":
            generate.main(f"--checkpoint {given} --output {new / 'song.mid'} --device cpu".split())
        elif command.startswith("export"):
            best = command.split()[1:]
            export.main(["--checkpoint", given, "--output", str(new / "model"), *best])
        else:
            settings = config("", given, resume="auto" if "--resume" in command else None)
            load_for_resume(settings, place / "run" / "checkpoints", {}, 1, None, start_job("cpu"))
    text = str(error.value)
    assert "\n" not in text and str(place / name) in text and "denied" in text, text
    assert not any(new.iterdir())
