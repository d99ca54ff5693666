"""The tuner, as far as it goes without a GPU: what it searches, what it takes, what it writes."""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import torch

from benchmarks import tune
from meloformer.errors import UserError
from meloformer.kernels.launch import Entry, Launch, Launches


@pytest.mark.parametrize(("dtype", "quick"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_candidates_are_launches_without_repeats(dtype, quick):
    found = tune.candidates(dtype, quick)
    assert len(set(found)) == len(found) > 5


def test_search_times_what_compiles(monkeypatch):
    """The compiler refuses 128 columns here, and time falls with the number of warps."""

    def compile_(ids, length, shape, kernel, launch):
        return "too many registers" if launch.columns == 128 else None

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
    tries = [("dq_far", Launch(columns=c, warps=w)) for c in (64, 128) for w in (4, 8)]
    rows = {"a": ([np.arange(3)], 8), "b": ([np.arange(5)], 8)}
    monkeypatch.setattr(tune, "pack", lambda ids, length: None)
    results = tune.search(rows, tries, (1, 64, torch.bfloat16), 1, 2)
    assert [("failed" in r) for r in results] == [False, False, True, True]
    launch, ms = tune.best(results, "dq_far")
    assert launch == Launch(columns=64, warps=8) and ms == pytest.approx(2 / 8)
    with pytest.raises(UserError, match="no launch of dkv_near"):
        tune.best(results, "dkv_near")


class _Noting:
    def __init__(self, now, launches):
        now.append(1 / launches.dq_far.warps)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_the_table_it_writes_can_be_read(tmp_path, monkeypatch):
    old = Entry((8, 0), 64, 2, Launches.all(Launch(32, 32)), "old GPU", "2026-01-01")
    same = Entry((9, 0), 64, 2, Launches(), "a GPU", "2026-01-01")
    monkeypatch.setattr(tune, "TABLE", (old, same))
    new = Entry((9, 0), 64, 2, Launches.all(Launch(64, 128, 8, 2, 168)), "a GPU", "2026-02-02")
    path = tmp_path / "tuned.py"
    tune.write_table(new, path)
    spec = spec_from_file_location("meloformer.kernels.tuned_for_test", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TABLE == (old, new)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA"):
        tune.main([])
