"""The benchmark of generation, on a tiny model."""

import json

import numpy as np
import pytest

from benchmarks import generate as module
from benchmarks.common import step_kernels
from meloformer.errors import UserError
from meloformer.model.transformer import ModelConfig

TINY = ModelConfig(layers=1, dim=32, heads=2, ffn=32)


def test_the_page_has_a_row_for_each_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SIZES", {"tiny": TINY})
    args = "--sizes tiny --methods cache,recompute,dense,int8 --contexts 600 --batches 1,2 --tokens 12"
    args += " --recomputed 3 --device cpu --json"
    module.main([*args.split(), str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["method"], row["batch"], row["tokens"]) for row in rows] == [
        *(("cache", 1, 12), ("cache", 2, 24)),
        *(("recompute", 1, 3), ("recompute", 2, 6)),
        *(("dense", 1, 12), ("dense", 2, 24)),
        *(("int8", 1, 12), ("int8", 2, 24)),
    ]
    assert all(400 < row["prompt"] <= 600 and row["tokens_per_cpu_s"] > 0 for row in rows)
    sizes = {row["method"]: row["cache_bytes"] for row in rows}
    assert 0 == sizes["recompute"] < sizes["dense"] < sizes["cache"]
    page = (tmp_path / "speed.md").read_text()
    assert page.count("| tiny | ") == 8 and page in capsys.readouterr().out


def test_songs_by_graphs_are_counted_from_the_second_block_on(monkeypatch):
    """The steps of a graph, one after the other, on the CPU."""
    monkeypatch.setattr(module, "SIZES", {"tiny": TINY})
    monkeypatch.setattr(module, "require_gpu", lambda device: None)
    results = []
    monkeypatch.setattr(module.folder_report, "publish", lambda result, page, path: results.append(result))
    module.main("--sizes tiny --methods graphs --contexts 600 --tokens 96 --device cpu".split())
    (row,) = results[0]["rows"]
    assert (row["method"], row["batch"], row["tokens"]) == ("graphs", 1, 32) and row["tokens_per_s"] > 0


def test_kernels_are_told_by_step(monkeypatch):
    events = [("project_kernel", 120, 300.0), ("draw_kernel", 10, 200.0), ("fill", 20, 10.0)]
    rows = step_kernels.of_steps(events, once="draw_kernel")
    assert [(row["kernel"], row["launches"], row["us"]) for row in rows] == [
        *(("project_kernel", 12, 30), ("draw_kernel", 1, 20), ("fill", 2, 1)),
    ]
    with pytest.raises(ValueError, match="no kernel"):
        step_kernels.of_steps(events[:1], once="draw_kernel")
    monkeypatch.setattr(module, "SIZES", {"tiny": TINY})
    monkeypatch.setattr(module, "require_gpu", lambda device: None)

    def profiled(run, once):
        run()
        return rows

    pages = []
    monkeypatch.setattr(module.step_kernels, "profiled", profiled)
    monkeypatch.setattr(module.folder_report, "publish", lambda result, page, path: pages.append(page))
    module.main("--sizes tiny --methods graphs --contexts 600 --tokens 96 --kernels --device cpu".split())
    assert "| project_kernel | 12.0 | 30.0 |" in pages[0]


def test_graphs_need_a_gpu_and_some_blocks(monkeypatch):
    for args, says in (
        (["--device", "cpu"], "needs a GPU"),
        (["--device", "cpu", "--tokens", "64"], "--tokens"),
    ):
        with pytest.raises(UserError, match=says):
            module.main(["--methods", "graphs", *args])
        monkeypatch.setattr(module, "require_gpu", lambda device: None)


def test_a_composed_song_follows_its_prompt():
    draft = module.draft(1, 700, 30)
    begin = len(draft.ids)
    while not draft.finished:
        draft.append_required()
        draft.draw(module.torch.zeros(module.vocab.VOCAB_SIZE))
    song = next(
        ids
        for bars in (8, 16, 32)
        if len(ids := module.HIDTokenizer().encode(module.compose(1, bars=bars))) >= 730
    )
    np.testing.assert_array_equal(draft.ids, song[: begin + 30])


@pytest.mark.parametrize(
    "args", [["--sizes", "tiny"], ["--methods", "magic"], ["--contexts", "many"], ["--contexts", "2"]]
)
def test_wrong_flags_are_refused(args):
    with pytest.raises(UserError, match=args[0]):
        module.main(args)
