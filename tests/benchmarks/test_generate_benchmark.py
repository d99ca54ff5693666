"""The benchmark of generation, on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import generate as module
from benchmarks.common import step_kernels
from benchmarks.generating import bandwidth, measure, songs
from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.model.transformer import ModelConfig
from meloformer.tokens import vocab
from meloformer.tokens.tokenizer import HIDTokenizer

TINY = ModelConfig(layers=1, dim=32, heads=2, ffn=32)
CONTEXT = ["--sizes", "tiny", "--contexts", "600", "--device", "cpu"]
NO_WAITS = ["--prompts", "0", "--song_bars", "0"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(module, "SIZES", {"tiny": TINY})
    monkeypatch.setitem(bandwidth.BUFFER_BYTES, "cpu", 2**16)
    monkeypatch.setattr(measure, "_MORE", 1)


def run(*args: str, folder) -> tuple[dict, str]:
    """Figures and page."""
    module.main([*CONTEXT, *args, "--json", str(folder / "speed.json")])
    return json.loads((folder / "speed.json").read_text()), (folder / "speed.md").read_text()


def test_the_page_has_a_row_for_each_case(tmp_path, capsys):
    args = "--methods cache,recompute,dense,int8 --batches 1,2 --tokens 12 --recomputed 3"
    result, page = run(*args.split(), "--prompts", "512", "--song_bars", "1", folder=tmp_path)
    rows = result["rows"]
    assert [(row["method"], row["batch"], row["tokens"]) for row in rows] == [
        *(("cache", 1, 12), ("cache", 2, 24)),
        *(("recompute", 1, 3), ("recompute", 2, 6)),
        *(("dense", 1, 12), ("dense", 2, 24)),
        *(("int8", 1, 12), ("int8", 2, 24)),
    ]
    assert all(400 < row["prompt"] <= row["context"] == 600 and row["tokens_per_cpu_s"] > 0 for row in rows)
    sizes = {row["method"]: row["cache_bytes"] for row in rows}
    assert 0 == sizes["recompute"] < sizes["dense"] < sizes["cache"]
    shares = {row["method"]: row["bandwidth_share"] for row in rows}
    assert shares.pop("recompute") is None and all(share > 0 for share in shares.values())
    assert page.count("| tiny | ") == 8 + 3 and page in capsys.readouterr().out
    assert result["peak"]["read"] > 0 and "GB/s by a sum of it" in page
    (waits,) = result["waits"]
    assert [row["what"] for row in waits["rows"]] == [
        *("first token of a new song", "reading a prompt", "a whole song of 1 bars"),
    ]
    assert all(row["first_s"] > 0 and row["again_s"] > 0 for row in waits["rows"])
    assert "](speed_speed.png)" in page and (tmp_path / "speed_speed.png").stat().st_size > 10_000


def test_files_of_one_device_become_one_page(tmp_path):
    result, page = run("--methods", "cache", "--tokens", "3", *NO_WAITS, folder=tmp_path)
    more = json.loads(json.dumps(result))
    more["rows"][0]["tokens_per_s"] = 12345.0  # of the same row: this one counts
    more["rows"].append(more["rows"][0] | {"batch": 64, "tokens_per_s": 777.0})
    (tmp_path / "more.json").write_text(json.dumps(more))
    sources = [str(tmp_path / "speed.json"), str(tmp_path / "more.json")]
    module.main(["--from", *sources, "--output", str(tmp_path / "both.md")])
    both = (tmp_path / "both.md").read_text()
    assert both.count("| tiny | cache | ") == 3 and "12,345.0" in both and "777.0" in both
    assert "](both_speed.png)" in both and (tmp_path / "both_speed.png").is_file()
    module.main(["--from", sources[0], "--output", str(tmp_path / "speed.md")])
    assert (tmp_path / "speed.md").read_text() == page

    more["dtype"] = "bfloat16"
    (tmp_path / "more.json").write_text(json.dumps(more))
    with pytest.raises(UserError, match=r"more\.json and speed\.json differ in dtype"):
        module.main(["--from", *sources, "--output", str(tmp_path / "both.md")])
    (tmp_path / "more.json").write_text("{}")
    for args, says in (
        (["--from", *sources, "--output", "x.md"], "not a result"),
        (["--from", *sources], "--output"),
    ):
        with pytest.raises(UserError, match=says):
            module.main(args)


@pytest.mark.parametrize("name", ["generation_cpu", "generation_h200"])
def test_the_committed_page_is_that_of_its_figures(name, tmp_path):
    results = Path(module.__file__).parent / "results"
    sources = sorted(results.glob(f"{name}/*.json")) or [results / f"{name}.json"]
    module.main(["--from", *map(str, sources), "--output", str(tmp_path / f"{name}.md")])
    assert (tmp_path / f"{name}.md").read_text() == (results / f"{name}.md").read_text()
    assert (results / f"{name}_speed.png").is_file()


def test_songs_by_graphs_are_counted_from_the_second_block_on(monkeypatch, tmp_path):
    """The steps of a graph, one after the other, on the CPU."""
    monkeypatch.setattr(module, "require_gpu", lambda device: None)
    result, _ = run("--methods", "graphs", "--tokens", "96", *NO_WAITS, folder=tmp_path)
    (row,) = result["rows"]
    assert (row["method"], row["batch"], row["tokens"]) == ("graphs", 1, 32) and row["tokens_per_s"] > 0
    assert result["waits"][0]["method"] == "graphs" and row["bandwidth_share"] > 0

    monkeypatch.setattr(module, "pick_cache_dtype", lambda *_: None)
    result, _ = run("--methods", "fp8_graphs", "--tokens", "96", *NO_WAITS, folder=tmp_path)
    (rounded,) = result["rows"]
    assert rounded["cache_bytes"] * 4 == row["cache_bytes"]  # of float32
    assert row["step_bytes"] / 3 < rounded["step_bytes"] < row["step_bytes"]


def test_kernels_are_told_by_step(monkeypatch, tmp_path):
    events = [("project_kernel", 120, 300.0), ("draw_kernel", 10, 200.0), ("fill", 20, 10.0)]
    rows = step_kernels.of_steps(events, once="draw_kernel")
    assert [(row["kernel"], row["launches"], row["us"]) for row in rows] == [
        *(("project_kernel", 12, 30), ("draw_kernel", 1, 20), ("fill", 2, 1)),
    ]
    with pytest.raises(ValueError, match="no kernel"):
        step_kernels.of_steps(events[:1], once="draw_kernel")
    monkeypatch.setattr(module, "require_gpu", lambda device: None)

    def profiled(run, once):
        run()
        return rows

    monkeypatch.setattr(step_kernels, "profiled", profiled)
    monkeypatch.setattr(module, "waits", lambda *_: [])  # which take long without kernels
    _, page = run("--methods", "graphs", "--tokens", "96", "--kernels", *NO_WAITS, folder=tmp_path)
    assert "| `project_kernel` | 12.0 | 30.0 | 59% |" in page and "| together | 15.0 | 51.0 |  |" in page


def test_graphs_need_a_gpu_and_some_blocks(monkeypatch):
    for args, says in (
        (["--device", "cpu"], "needs a GPU"),
        (["--device", "cpu", "--tokens", "64"], "--tokens"),
    ):
        with pytest.raises(UserError, match=says):
            module.main(["--sizes", "tiny", "--methods", "graphs", *args])
        monkeypatch.setattr(module, "require_gpu", lambda device: None)
    with pytest.raises(UserError, match="needs an NVIDIA GPU of compute capability"):
        module.main(["--sizes", "tiny", "--methods", "fp8_graphs", "--device", "cpu"])


def test_a_composed_song_follows_its_prompt():
    draft = songs.draft_of(1, 700, 30)
    begin = len(draft.ids)
    while not draft.finished:
        draft.append_required()
        draft.draw(torch.zeros(vocab.VOCAB_SIZE))
    song = next(
        ids for bars in (8, 16, 32) if len(ids := HIDTokenizer().encode(compose(1, bars=bars))) >= 730
    )
    np.testing.assert_array_equal(draft.ids, song[: begin + 30])


@pytest.mark.parametrize("graphs", [False, True])
def test_a_whole_song_is_written_to_its_end(graphs):
    model = module.MeloFormer(TINY).eval()
    turns = songs.write_whole(model, 1, graphs)
    assert sum(1 for _ in turns) == len(songs.whole_song(1)) - 2  # without BOS and EOS


@pytest.mark.parametrize(
    "args",
    [
        ["--sizes", "huge"],
        ["--methods", "magic"],
        ["--contexts", "many"],
        ["--contexts", "2"],
        ["--prompts", "9"],
        ["--prompts", "99999"],
        ["--song_bars", "-1"],
        ["--output", "page.md"],
    ],
)
def test_wrong_flags_are_refused(args):
    with pytest.raises(UserError, match=args[0]):
        module.main(["--sizes", "tiny", *args])
