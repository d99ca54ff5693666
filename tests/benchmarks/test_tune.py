"""The tuner, as far as it goes without a GPU: what it searches, what it takes, what it writes."""

import runpy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from benchmarks import tune
from meloformer.errors import UserError
from meloformer.kernels.launch import TABLE, Entry, Launch, Launches, read_entry


@pytest.mark.parametrize(("dtype", "quick"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_candidates_are_launches_without_repeats(dtype, quick):
    found = tune.candidates(dtype, quick)
    assert len(set(found)) == len(found) > 5


@pytest.mark.parametrize("quick", [False, True])
def test_what_was_measured_best_is_tried(quick):
    of_half = [entry for entry in TABLE if entry.itemsize == 2]
    assert {*(launch for e in of_half for launch in vars(e.launches).values())} <= {
        *tune.candidates(torch.bfloat16, quick)
    }
    assert len(tune.candidates(torch.bfloat16, True)) < 30


def test_search_times_what_compiles(monkeypatch):
    """The compiler refuses block_n 32 here, and time falls with the number of warps."""

    def compile_(ids, length, shape, kernel, launch):
        return "too many registers" if launch.block_n == 32 else None

    class Row:
        def __init__(self, structure, *shape):
            pass

        def run(self, kernel):
            return kernel

    now = []
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(tune, "_compile", compile_)
    monkeypatch.setattr(tune, "Row", Row)
    monkeypatch.setattr(tune, "_median_ms", lambda run, repeats: now[-1])
    monkeypatch.setattr(tune, "override", lambda launches: _Noting(now, launches))
    tries = [("dq_same_inst", Launch(block_n=c, num_warps=w)) for c in (64, 32) for w in (4, 8)]
    rows = {"a": ([np.arange(3)], 8), "b": ([np.arange(5)], 8)}
    monkeypatch.setattr(tune, "pack", lambda ids, length: None)
    results = tune.search(rows, tries, (1, 64, torch.bfloat16), 1, 2)
    assert [("failed" in r) for r in results] == [False, False, True, True]
    launch, ms = tune.best(results, "dq_same_inst")
    assert launch == Launch(block_n=64, num_warps=8) and ms == pytest.approx(2 / 8)
    with pytest.raises(UserError, match="no launch of dkv_local"):
        tune.best(results, "dkv_local")


class _Noting:
    def __init__(self, now, launches):
        now.append(1 / launches.dq_same_inst.num_warps)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_the_table_it_writes_can_be_read(tmp_path, monkeypatch):
    old = Entry("nvidia", (8, 0), 64, 2, Launches.all(Launch(32, 32)), "old GPU", "2026-01-01")
    same = Entry("nvidia", (9, 0), 64, 2, Launches(), "a GPU", "2026-01-01")
    monkeypatch.setattr(tune, "TABLE", (old, same))
    new = Entry("nvidia", (9, 0), 64, 2, Launches.all(Launch(64, 32, 8, 2, 168)), "a GPU", "2026-02-02")
    path = tmp_path / "tuned.py"
    tune.write_table(new, path)
    written = runpy.run_path(str(path))["ENTRIES"]
    assert [read_entry(**entry) for entry in written] == [old, new]


def test_the_table_is_as_the_tuner_writes_it(tmp_path):
    tune.write_table(TABLE[0], tmp_path / "tuned.py")
    assert (tmp_path / "tuned.py").read_text() == tune.TUNED.read_text()


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA"):
        tune.main([])
