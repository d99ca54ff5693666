import os

import pytest
import torch
from matplotlib.figure import Figure

from meloformer.errors import UserError
from meloformer.model.transformer import MeloFormer
from meloformer.tokens.grammar import check
from meloformer.tokens.tokenizer import HIDTokenizer
from meloformer.training import samples
from meloformer.training.samples import write_sample

from helpers.full_disk import full_disk
from helpers.tiny_train import TINY


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(samples, "MAX_TOKENS", 300)


def write(folder, stops=lambda: False):
    torch.manual_seed(0)  # there are weights that write rests alone
    model = MeloFormer(TINY).train()
    done = write_sample(model, folder, 7, max_context=256, attention="reference", stops=stops)
    assert model.training
    return done


def test_a_sample_is_a_song_and_its_picture(tmp_path, short):
    assert write(tmp_path / "samples")
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-00000007.mid", "step-00000007.png"]
    check(HIDTokenizer().encode(tmp_path / "samples" / "step-00000007.mid"))


def test_a_stop_breaks_it_off(tmp_path, short):
    asked = []
    assert not write(tmp_path / "samples", lambda: bool(asked.append(1) or len(asked) == 5))
    assert len(asked) == 5 and not (tmp_path / "samples").exists()


def test_a_full_disk_is_told_with_the_name_of_the_sample(tmp_path, short, monkeypatch):
    """The trainer makes one line of it."""
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError) as error:
        write(tmp_path / "samples")
    assert error.value.filename == str(tmp_path / "samples" / "step-00000007.mid")
    assert not list((tmp_path / "samples").iterdir())


def test_a_full_disk_under_the_picture_keeps_the_sample(tmp_path, short, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(UserError, match=r"cannot write the picture .*step-00000007\.png: No space left"):
        write(tmp_path / "samples")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-00000007.mid"]


def test_a_sample_without_a_note_is_told_and_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samples, "MAX_TOKENS", 2)
    assert write(tmp_path / "samples")
    assert "no note" in capsys.readouterr().out and not (tmp_path / "samples").exists()
