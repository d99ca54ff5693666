"""The rows that benchmarks measure, the timer, and the figures of a column, on CPU."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.attention import measure
from benchmarks.attention.measure import Shape, WrongResult
from benchmarks.common import timing
from benchmarks.common.timing import Timer
from benchmarks.songs import loading, structures
from meloformer.errors import UserError
from meloformer.kernels import make_attention

from helpers.attention_cases import PHASES, case, dense_case, outputs_and_gradients, random_inputs

ROOT = Path(__file__).resolve().parents[2]
STRUCTURES = ("documents", "rows", "padding_row", "16_instruments", "empty_bars")
TINY = Shape(heads=2, dim=8, dtype=torch.float32)


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


class TestTimer:
    def test_only_run_is_timed(self):
        found = Timer("cpu").after(lambda: time.sleep(0.02), lambda _: None)
        assert found["p20"] <= found["ms"] <= found["p80"] < 10
        assert found["host_ms"] <= found["wall_ms"] < 10 and found["repeats"] == timing.REPEATS

    def test_what_is_prepared_is_run_once(self):
        prepared, ran = [], []
        Timer("cpu").after(lambda: prepared.append(0) or len(prepared), ran.append)
        assert ran == list(range(1, len(prepared) + 1))

    def test_long_calls_are_repeated_less(self, monkeypatch):
        monkeypatch.setattr(timing, "BUDGET_MS", 60.0)
        calls = []
        found = Timer("cpu")(lambda: calls.append(time.sleep(0.02)))
        assert 2 <= found["repeats"] <= 3 and len(calls) == found["repeats"] + 1
        assert found["ms"] >= 20

    def test_on_a_gpu_the_flush_stands_before_the_events(self, monkeypatch):
        log = []
        event = SimpleNamespace(record=lambda: log.append("event"), elapsed_time=lambda end: 2.0)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        timer = Timer("cpu")
        timer._cuda, timer._flush_ms = True, 1.0
        timer._flush = SimpleNamespace(zero_=lambda: log.append("flush"))
        found = timer.after(lambda: log.append("prepare"), lambda _: log.append("run"))
        assert found["ms"] == 2.0
        assert log[-5:] == ["prepare", "flush", "event", "run", "event"]
        timer._flush_ms = 1e-9  # a host that is far behind
        timer(lambda: log.append("run"))
        assert log[-4:] == ["flush", "event", "run", "event"] and log[-67:].count("flush") == 64

    def test_memory_counts_each_storage_once(self, monkeypatch):
        timer = Timer("cpu")
        assert timer.extra_mb(list) is None
        timer._cuda = True
        found = {"memory_allocated": 1_000_000, "max_memory_allocated": 9_000_000}
        for name in ("synchronize", "reset_peak_memory_stats", *found):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: found.get(name))
        x = torch.empty(500_000)
        assert timer.extra_mb(lambda: [x, x[1:]]) == 6.0


class TestMeasure:
    def of(self, column, name="documents", shape=TINY):
        return measure.measure(column, case(name).structure, shape, Timer("cpu"))

    def test_reference(self):
        found = self.of("reference")
        assert found["dtype"] == "float32" and found["tokens"] == case("documents").structure.doc.shape[1]
        assert len(found["errors"]) == 12 and all(0 <= e < 2 for e in found["errors"].values())
        for phase in PHASES:
            assert found[phase]["forward"]["ms"] > 0 and found[phase]["backward"]["ms"] > 0
        assert found["plan"]["ms"] > 0 and found["first_call_s"] > 0

    @pytest.mark.parametrize("column", ["flex", "flex_sorted", "flex_fp32"])
    def test_flex_is_padded_and_counts_its_blocks(self, column):
        shape = Shape(heads=1, dim=8, dtype=torch.bfloat16)
        structure = case("one_bar").structure
        assert structure.doc.shape[1] < 2048
        found = measure.measure(column, structure, shape, Timer("cpu"))
        assert found["tokens"] == 2048 and "summarize" not in found
        assert found["dtype"] == ("float32" if column == "flex_fp32" else "bfloat16")
        assert found["computed_pairs"] == 128 * 128  # one block of tokens, which has the summary too

    def test_dense(self):
        found = self.of("dense_flash")
        length = case("documents").structure.doc.shape[1]
        assert found["computed_pairs"] == length * (length + 1) // 2
        assert set(found["errors"]) == {"update o", "update dq", "update dk", "update dv"}
        assert all(0 <= e < 2 for e in found["errors"].values())
        assert "plan" not in found and "summarize" not in found

    def test_errors_are_seen(self, monkeypatch):
        plain = make_attention(case("documents").structure, "reference")
        found = measure._errors(
            "update", lambda *x: plain.update(*x) * 1.01, plain.update,
            measure.phase_inputs(plain.structure, "update", TINY),
        )  # fmt: skip
        with pytest.raises(WrongResult, match=r"update o errs .* 2 allowed"):
            measure.refuse_errors(found)
        measure.refuse_errors({"update o": 2.0, "update dq": 3.0})
        with pytest.raises(WrongResult, match=r"update dq errs 3\.10 .* 3 allowed"):
            measure.refuse_errors({"update o": 2.0, "update dq": 3.1})

    def test_nan_is_no_result(self):
        plain = make_attention(case("documents").structure, "reference")
        inputs = measure.phase_inputs(plain.structure, "update", TINY)
        with pytest.raises(WrongResult, match="update o is not finite"):
            measure._errors("update", lambda *x: plain.update(*x) * float("nan"), plain.update, inputs)

    def stand_in(self, monkeypatch, visible: int):
        """`triton` as the reference, with the statistics of a plan."""
        statistics = {"visible": visible, "computed": 99, "full": 9, "tiles": 3, "bytes": 5}

        def make(structure, backend):
            attention = make_attention(structure, "reference")
            if backend == "triton":
                attention.backend = "triton"
                attention._implementation.plan = SimpleNamespace(statistics=lambda: statistics)
            return attention

        monkeypatch.setattr(measure, "make_attention", make)

    def test_triton_tells_its_pairs_and_bytes(self, monkeypatch):
        self.stand_in(monkeypatch, structures.visible_pairs(case("documents").structure))
        found = self.of("triton")
        assert (found["computed_pairs"], found["full_pairs"], found["plan_bytes"]) == (99, 9, 5)
        assert found["summarize"]["forward"]["ms"] > 0

    def test_a_plan_that_misses_pairs_is_not_timed(self, monkeypatch):
        self.stand_in(monkeypatch, 1)
        with pytest.raises(WrongResult, match="the plan covers 1 pairs"):
            self.of("triton")

    def test_triton_with_errors_is_not_timed(self, monkeypatch):
        self.stand_in(monkeypatch, structures.visible_pairs(case("documents").structure))
        monkeypatch.setattr(measure, "sparse_errors", lambda *_: {"update o": 2.5})
        with pytest.raises(WrongResult, match=r"errs 2\.50"):
            self.of("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure at full length")
def test_pytest_benchmarks_run_on_cpu():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "-rs",
        "-p",
        "no:cacheprovider",
    ]
    # A test process is a worker of pytest-xdist: the new one is not.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-k", "small-256-batch1 or base-2048"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b7 passed, 35 skipped", done.stdout), done.stdout
    assert "needs a CUDA device" in done.stdout
    measured = set(re.findall(r"^(test_\w+)\[", done.stdout, re.M))
    assert measured == {"test_plan", "test_forward", "test_backward", "test_forward_and_backward"}
