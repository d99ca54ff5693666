"""Songs to measure with, and the structures of rows made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.songs import loading, structures
from meloformer.errors import UserError
from meloformer.kernels import make_attention

from helpers.attention_cases import PHASES, case, dense_case, outputs_and_gradients, random_inputs

STRUCTURES = ("documents", "rows", "padding_row", "16_instruments", "empty_bars")


@pytest.fixture(scope="module")
def composed():
    return loading.compose_songs(3, 3)


class TestSongs:
    def test_rows_begin_with_different_songs_and_are_cut(self, composed):
        ids = list(composed.values())
        structure = structures.pack(ids, 500, rows=2)
        assert structure.doc.shape == (2, 500) and structure.summary_doc.shape == (2, 128)
        for row, first in zip(structure.doc, ids):
            assert int((row == 0).sum()) == min(len(first), 500)
        assert (structure.doc >= 0).all()

    def test_songs_are_repeated(self, composed):
        one = next(iter(composed.values()))
        structure = structures.pack([one], 2 * len(one) + 5)
        assert torch.bincount(structure.doc[0].long()).tolist() == [len(one), len(one), 5]
        assert torch.equal(structure.onset[0, : len(one)], structure.onset[0, len(one) : 2 * len(one)])

    def test_a_whole_song_is_as_long_as_it_is(self, composed):
        one = next(iter(composed.values()))
        assert structures.pack([one]).doc.shape == (1, len(one))

    def test_files(self, tmp_path, composed, capsys):
        from meloformer.composer.compose import compose

        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        compose(0, bars=3).dump(str(tmp_path / "a" / "x.mid"))
        (tmp_path / "a" / "broken.mid").write_bytes(b"MThd")
        np.save(tmp_path / "b" / "x.npy", composed["composed 1"])
        found = loading.read_songs([str(tmp_path / "a"), str(tmp_path / "b")])
        assert list(found) == ["x", "x (2)"]
        assert np.array_equal(found["x"], composed["composed 0"])
        assert np.array_equal(found["x (2)"], composed["composed 1"])
        assert "left out: broken.mid" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"broken\.mid"):
            loading.read_songs([str(tmp_path / "a" / "broken.mid")])

    def test_what_holds_no_song(self, tmp_path):
        (tmp_path / "x.mid").write_bytes(b"MThd")
        with pytest.raises(UserError, match="no file could be read"):
            loading.read_songs([str(tmp_path)])
        np.save(tmp_path / "x.npy", np.zeros((2, 2)))
        with pytest.raises(UserError, match=r"float64 \[2, 2\], not token ids"):
            loading.read_songs([str(tmp_path / "x.npy")])

    @pytest.mark.parametrize("name", STRUCTURES)
    def test_visible_pairs(self, name, monkeypatch):
        monkeypatch.setattr(structures, "_PAIRS_AT_ONCE", 3000)  # more than one chunk
        assert structures.visible_pairs(case(name).structure) == int(case(name).regular_mask.sum())

    def test_rows_made_of_others_keep_their_rule(self):
        structure = replace(case("rows").structure, near_bars=(3,), kind_rule="next")
        made = structures.cut(structure, 50), structures.padded(structure, 64)
        made += (structures.reordered(structure, structures.instrument_order(structure)),)
        assert {(rows.near_bars, rows.kind_rule) for rows in made} == {((3,), "next")}
        assert structures.visible_pairs(structure) == int(dense_case(structure).regular_mask.sum())

    @pytest.mark.parametrize("name", STRUCTURES)
    def test_instrument_order(self, name):
        structure = case(name).structure
        order = structures.instrument_order(structure)
        assert torch.equal(order.sort(dim=1).values, torch.arange(order.shape[1]).expand_as(order))
        for row, moved in enumerate(order):
            facts = structure.tokens.at(row, moved)
            keys = [
                (doc if doc >= 0 else 10**9, inst, "STTLV"[kind], position)
                for doc, inst, kind, position in zip(
                    *(x.tolist() for x in (facts.doc, facts.inst, facts.kind, facts.position))
                )
            ]
            keys = [(doc, inst, "STLV".index(kind), position) for doc, inst, kind, position in keys]
            assert keys == sorted(keys)

    @pytest.mark.parametrize("phase", PHASES)
    @pytest.mark.parametrize("name", STRUCTURES)
    @pytest.mark.parametrize("backend", ["reference", "flex"])
    def test_reordered_rows_are_the_same_attention(self, backend, name, phase):
        structure = case(name).structure
        order = structures.instrument_order(structure)
        inputs = random_inputs(phase, structure, torch.float64)

        regular = {id(x) for x in ((*inputs[:3], inputs[5]) if phase == "update" else inputs[3:5])}

        def moved(x, stream):
            return x.gather(2, order[:, None, :, None].expand_as(x)) if id(stream) in regular else x

        expected = outputs_and_gradients(getattr(make_attention(structure, "reference"), phase), inputs)
        streams = [inputs[0], *inputs[:5]]  # o is of the stream of q
        function = getattr(make_attention(structures.reordered(structure, order), backend), phase)
        got = outputs_and_gradients(function, [moved(x, x) for x in inputs])
        for stream, exact, result in zip(streams, expected, got):
            torch.testing.assert_close(result, moved(exact, stream), rtol=0, atol=1e-12)

    def test_padded_and_cut_rows_have_the_same_structure(self):
        structure = case("documents").structure
        longer = structures.padded(structure, 64)
        n = structure.doc.shape[1]
        assert longer.doc.shape[1] % 64 == 0 and (longer.doc[:, n:] == -1).all()
        assert structures.visible_pairs(longer) == structures.visible_pairs(structure)
        for a, b in zip(structure.tokens, longer.tokens):
            assert torch.equal(a, b[:, :n])
        shorter = structures.cut(structure, 7)
        for a, b in zip(structure.tokens, shorter.tokens):
            assert torch.equal(a[:, :7], b)
