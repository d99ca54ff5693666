"""Outputs that cannot be written, exist or must stay: told before the work begins."""

import errno
import os
from pathlib import Path

import pytest

from meloformer import generate as module
from meloformer.errors import UserError

from helpers.full_disk import full_disk


@pytest.fixture
def no_work(monkeypatch):
    """Reading the prompt and loading the model must not be reached."""
    for name in ("read_prompt", "load_model"):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize(
    "name, says",
    [
        ("taken.png", "is a folder"),
        ("none/x.png", "there is no folder .*none"),
        ("file/x.png", "there is no folder .*file"),
        ("pipe.png", "not a regular file"),
        ("x" * 300 + ".png", "name too long"),
        ("x" * 248 + ".png", "name too long"),  # with what is added while it is written
        ("nul\0.png", "null byte"),
    ],
)
@pytest.mark.parametrize("flag", ["--output", "--picture"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, no_work, flag, name, says):
    folder = tmp_path / "here"
    (folder / "taken.png").mkdir(parents=True)
    (folder / "file").touch()
    os.mkfifo(folder / "pipe.png")
    before = sorted(folder.iterdir())
    places = {"--output": str(tmp_path / "x.mid")} | {flag: f"{folder}/{name}"}
    with pytest.raises(UserError, match=f"(?i)^{flag} .*{says}") as error:
        module.main(["--checkpoint", "c", *(word for place in places.items() for word in place)])
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before and not (tmp_path / "x.mid").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_folder_that_takes_no_file_is_told_before_the_work(tmp_path, no_work, monkeypatch, code):
    """As root no permission is missing: the answer of the system is made up."""

    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"^--output .*x\.mid.*\({os.strerror(code)}\)$"):
        module.main(["--checkpoint", "c", "--output", str(tmp_path / "x.mid")])
    assert not list(tmp_path.iterdir())


def test_a_device_is_not_replaced(no_work):
    with pytest.raises(UserError, match="--output /dev/full: exists and is not a regular file"):
        module.main(["--checkpoint", "c", "--output", "/dev/full"])


def test_the_picture_does_not_replace_the_song(tmp_path, no_work):
    (tmp_path / "link").symlink_to(tmp_path)
    paths = ["--output", str(tmp_path / "x.png"), "--picture", str(tmp_path / "link" / "x.png")]
    with pytest.raises(UserError, match="same file as --output"):
        module.main(["--checkpoint", "c", *paths])
    (tmp_path / "x.png").touch()
    os.link(tmp_path / "x.png", tmp_path / "y.png")
    paths = ["--output", str(tmp_path / "x.png"), "--picture", str(tmp_path / "y.png"), "--overwrite"]
    with pytest.raises(UserError, match=r"^--picture .*y\.png: is the same file as --output"):
        module.main(["--checkpoint", "c", *paths])


def test_the_picture_is_not_written_through_the_song(tmp_path, no_work):
    paths = ["--output", str(tmp_path / "x.png.tmp"), "--picture", str(tmp_path / "x.png")]
    with pytest.raises(UserError, match=r"^--picture .*x\.png: .* is written through it"):
        module.main(["--checkpoint", "c", *paths])
    assert not list(tmp_path.iterdir())


def existing_file(path, kind):
    """Something at `path` that is not to be lost, and where its content is."""
    if kind == "link to nothing":
        path.symlink_to(path.with_name("elsewhere"))
        return None
    content = path.with_name("content") if kind == "link" else path
    if kind == "left over":
        content = path.with_name(path.name + ".tmp")
    content.write_bytes(b"a year of work")
    if kind == "link":
        path.symlink_to(content)
    return content


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing", "left over"])
@pytest.mark.parametrize("flag", ["--output", "--picture"])
def test_an_existing_file_stays_unless_overwrite_is_asked_for(tmp_path, no_work, flag, kind):
    content = existing_file(tmp_path / "x.png", kind)
    before = sorted(tmp_path.iterdir())
    places = {"--output": str(tmp_path / "new.mid")} | {flag: str(tmp_path / "x.png")}
    words = ["--checkpoint", "c", *(word for place in places.items() for word in place)]
    with pytest.raises(UserError, match=f"^{flag} .*exists already: .*--overwrite"):
        module.main(words)
    assert sorted(tmp_path.iterdir()) == before
    assert content is None or content.read_bytes() == b"a year of work"
    with pytest.raises(pytest.fail.Exception, match="load_model was called"):
        module.main([*words, "--overwrite"])


@pytest.mark.parametrize(
    "name", ["prompt.mid", "symbolic.mid", "hard.mid", "folder/prompt.mid", "partial.mid"]
)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_the_prompt_is_never_replaced(tmp_path, no_work, name, overwrite):
    prompt = tmp_path / "prompt.mid"
    prompt.write_bytes(b"a song")
    (tmp_path / "symbolic.mid").symlink_to(prompt)
    (tmp_path / "folder").symlink_to(tmp_path)
    for link in ("hard.mid", "partial.mid.tmp"):
        os.link(prompt, tmp_path / link)
    words = ["--checkpoint", "c", "--prompt", str(prompt), "--output", str(tmp_path / name), *overwrite]
    with pytest.raises(UserError, match=r"^--output .*same file as --prompt"):
        module.main(words)
    assert prompt.read_bytes() == b"a song" and prompt.samefile(tmp_path / "hard.mid")


def test_a_full_disk_is_noticed_before_the_work(tmp_path, no_work, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)  # where file systems that allocate late notice it
    with pytest.raises(UserError, match=r"^--output .*x\.mid.* \(No space left on device\)$"):
        module.main(["--checkpoint", "c", "--output", str(tmp_path / "x.mid")])
    assert not list(tmp_path.iterdir())


def test_the_given_song_is_never_replaced(tmp_path, no_work):
    (tmp_path / "song.mid").write_bytes(b"a song")
    paths = ["--given", str(tmp_path / "song.mid"), "--output", str(tmp_path / "song.mid")]
    with pytest.raises(UserError, match=r"^--output .*same file as --given"):
        module.main(["--checkpoint", "c", *paths, "--add", "sax", "--overwrite"])
    assert (tmp_path / "song.mid").read_bytes() == b"a song"
