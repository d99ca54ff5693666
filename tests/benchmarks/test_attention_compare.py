import re

import pytest

from benchmarks.attention.compare import compare
from meloformer.errors import UserError

from helpers.report_cases import MACHINE, SETTINGS, entry, packed, result, song, times


class TestCompare:
    def flags(self, old, new) -> dict[str, str]:
        lines = [line for line in compare(old, new).splitlines() if line.startswith("| A ")]
        table = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        return {(line[1], line[2]): line[-1] for line in table}

    def test_flags_are_for_what_is_beyond_noise(self):
        new = song()
        update = new["columns"]["triton"]["update"]
        update["forward"], update["backward"] = times(0.25 * 0.9), times(0.55 * 1.5)
        new["columns"]["dense_flash"]["update"]["forward"] = times(1.0)
        flags = self.flags(result(song()), result(new))
        assert flags["Triton", "update forward, ms"] == ""
        assert flags["Triton", "update backward, ms"] == "**slower**"
        assert flags["dense, flash", "update forward, ms"] == "faster"
        assert {f for key, f in flags.items() if key[0] == "dense, cuDNN"} == {""}

    def test_ratio(self):
        new = song()
        new["columns"]["triton"]["update"]["forward"] = times(0.5)
        text = compare(result(song()), result(new))
        assert "| A \\| song | Triton | update forward, ms | 0.25 | 0.5 | 2.000 | **slower** |" in text

    def test_a_column_that_came_or_went(self):
        new = song()
        new["columns"]["triton"] = {"failed": "WrongResult: bad"}
        new["columns"]["flex_sorted"] = entry(1, 1)
        text = compare(result(song()), result(new))
        assert "| Triton | all | measured | failed: WrongResult: bad |  | **changed** |" in text
        assert re.search(r"sorted \| all \| failed: OutOf.*\| measured \|  \| \*\*changed\*\*", text)
        assert "fp32" not in text

    def test_rows_of_one_side_only(self):
        text = compare(result(song(), packed(2048)), result(song(), packed(4096)))
        assert "Only in old: packed to 2,048" in text and "Only in new: packed to 4,096" in text

    @pytest.mark.parametrize(
        ("new", "said"),
        [
            (result(song(), settings=SETTINGS | {"dim": 128}), "settings differ"),
            (result(packed(2048)), "share no row"),
        ],
        ids=["settings", "rows"],
    )
    def test_nothing_to_compare(self, new, said):
        with pytest.raises(UserError, match=said):
            compare(result(song()), new)

    def test_other_gpus_are_told(self):
        other = result(song(), machine=MACHINE | {"gpu": "Other GPU"})
        assert "GPUs differ" in compare(result(song()), other)
        assert "GPUs differ" not in compare(result(song()), result(song()))
