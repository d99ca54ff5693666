"""The figures of one column of the attention report, on CPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks.attention import measure
from benchmarks.attention.measure import Shape, WrongResult
from benchmarks.common.timing import Timer
from benchmarks.songs import structures
from meloformer.kernels import dense, make_attention

from helpers.attention_cases import PHASES, case

TINY = Shape(heads=2, dim=8, dtype=torch.float32)


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

    @pytest.mark.parametrize("name", ["documents", "rows"])
    def test_dense_by_document(self, name, monkeypatch):
        """With what PyTorch has on a CPU in the place of cuDNN."""
        monkeypatch.setattr(dense, "sdpa_kernel", lambda *_, **__: nullcontext())
        found = self.of("documents_cudnn", name)
        doc = case(name).structure.doc
        same = (doc[:, :, None] == doc[:, None]).tril()
        assert found["computed_pairs"] == int(same.sum())
        assert set(found["errors"]) == {"update o", "update dq", "update dk", "update dv"}
        assert all(0 <= e < 2 for e in found["errors"].values())

    def test_dense_of_a_batch(self):
        found = self.of("dense_flash", "rows")
        rows, length = case("rows").structure.doc.shape
        assert found["computed_pairs"] == rows * length * (length + 1) // 2

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
