import re

import pytest

from helpers.training import ROOT

MAY_IMPORT = {
    "common": {"common"},
    "songs": {"songs"},
    **{room: {"common", "songs", room} for room in ("attention", "training", "learning")},
}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_between_the_folders_of_benchmarks_go_one_way(room):
    files = sorted((ROOT / "benchmarks" / room).glob("*.py"))
    found = {
        name for file in files for name in re.findall(r"(?:from|import) benchmarks\.(\w+)", file.read_text())
    }
    assert len(files) > 2 and found <= MAY_IMPORT[room]
