import re
from pathlib import Path

import pytest
import torch

from meloformer import generate, preprocess, train
from meloformer.data import workers
from meloformer.midi import reader as midi_reader
from meloformer.model.transformer import SIZES, MeloFormer

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_mend_and_reason_is_explained():
    page = (ROOT / "docs" / "midi.md").read_text()
    for code, text in (midi_reader.MENDS | midi_reader.REASONS | workers.REASONS).items():
        assert re.search(rf"^\| `{code}` \| .*{re.escape(text)} \|$", page, re.M), code


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_sizes_are_those_of_the_code():
    page = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\d+)M \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M)
    told = {name: tuple(map(int, shape)) for name, _, *shape in rows}
    assert told == {name: (size.layers, size.dim, size.heads) for name, size in SIZES.items()}
    for name, millions, *_ in rows:
        with torch.device("meta"):
            count = sum(weight.numel() for weight in MeloFormer(SIZES[name]).parameters())
        assert count / 1e6 == pytest.approx(int(millions), rel=0.02), name


@pytest.mark.parametrize("command", [preprocess, train, generate], ids=lambda module: module.__name__)
def test_the_readme_uses_flags_that_exist(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    flags = capsys.readouterr().out
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(rf"-m {command.__name__} (.*)", readme)
    assert lines
    for line in lines:
        for flag in re.findall(r"--\w[\w-]*", line):
            assert flag in flags, flag


def test_the_page_of_generation_names_flags_that_exist():
    flags = generate.make_parser().format_help()
    for flag in set(re.findall(r"--\w+", (ROOT / "docs" / "generation.md").read_text())):
        assert re.search(rf"{flag}\b", flags), flag
