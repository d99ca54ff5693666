import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.learning import __main__ as learning
from benchmarks.learning.__main__ import FORMAT, gather
from benchmarks.learning.page import page, targets
from benchmarks.learning.run_folder import read_run
from benchmarks.learning.verdict import lower, verdict
from meloformer import preprocess, train
from meloformer.errors import UserError
from meloformer.model.transformer import SIZES
from meloformer.training.config import chosen_model, parse_args

from helpers.learning_runs import DATA, VERSIONS, write_run
from helpers.tiny_train import TINY
from helpers.training import config

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
SPARSE, DENSE = {2: 4.0, 4: 3.0, 8: 2.0}, {2: 4.5, 4: 3.2, 8: 2.5}


@pytest.fixture
def said(tmp_path):
    """What the verdict says of runs, each given as (losses, other arguments of `write_run`), by its head."""

    def tell(*runs: tuple[dict, dict]) -> dict[str, str]:
        by_kind: dict[str, list] = {}
        for number, (losses, more) in enumerate(runs):
            run = read_run(write_run(tmp_path / str(number), losses, seed=number, **more))
            by_kind.setdefault(run["attention"], []).append(run)
        sentences = verdict(*by_kind.values())
        return dict(re.fullmatch(r"\*\*(.*):\*\* (.*)\.", sentence).groups() for sentence in sentences)

    return tell


def pair(sparse: dict, dense: dict, **of_dense) -> tuple:
    return (sparse, {}), (dense, {"attention": "dense", **of_dense})


def test_lower_names_the_lower_one_and_by_how_much():
    assert lower({"a": [2.5], "b": [2.0]}) == (
        "b",
        "`b` is lower: 2.0000 nats per token with `b` and 2.5000 with `a`, 0.5000 or 20.0% apart; one seed "
        "each, so how much of that is chance is not known",
    )


def test_with_several_seeds_all_must_agree():
    which, text = lower({"a": [2.5, 2.25], "b": [2.0, 2.125]})
    assert which == "b" and "every seed of `b` is below every one of `a`" in text and "0.2500 apart" in text
    which, text = lower({"a": [2.5, 2.0], "b": [2.0, 1.5]})  # they meet
    assert which is None and text.startswith("no clear difference: 1.7500")
    assert "the ranges of their seeds, up to 0.5000 wide, overlap" in text
    assert lower({"a": [2.5, 2.0], "b": [1.9]})[0] == "b"


def test_equal_losses_are_no_difference():
    which, text = lower({"a": [2.0], "b": [2.0]})
    assert which is None and text.startswith("no clear difference: 2.0000") and "seed" not in text


def test_who_is_lower_at_equal_tokens_may_be_higher_at_equal_time(said):
    # Dense steps take half a second, sparse ones a tenth: dense is lower by tokens, sparse by time.
    found = said((SPARSE, {"step_s": 0.1}), ({2: 3.9, 4: 2.9, 8: 1.9}, {"attention": "dense"}))
    assert found["At equal tokens"].startswith(
        "within 0.80M tokens, by the lowest loss so far, `dense` is lower: 1.9"
    )
    assert found["Along the tokens"].endswith("is that of `dense` from 0.20M tokens to 0.80M tokens")
    # Sparse ends after 0.7 s; dense has its first validation after 0.5 s, 3.9, and its second after 1.5 s.
    assert found["At equal time"].startswith(
        "within 0.7 s, by the lowest loss so far, `triton` is lower: 2.0000"
    )
    assert "3.7000 with `dense`" in found["At equal time"]
    assert (
        found["Speed"] == "`triton` trains 5.00 times as fast as `dense`, 1,000,000 against 200,000 tokens/s"
    )


def test_the_faster_one_is_named_whichever_it_is(said):
    found = said((SPARSE, {}), (DENSE, {"attention": "dense", "step_s": 0.4}))
    assert found["Speed"].startswith("`dense` trains 1.25 times as fast as `triton`")


def test_slow_steps_can_turn_the_verdict(said):
    stalled = {"step_s": 0.1, "slow": {1: 0.1, 6: 3.0}}
    found = said((SPARSE, stalled), ({2: 3.9, 4: 2.9, 8: 1.9}, {"attention": "dense", "slow": {1: 0.1}}))
    told = found["At equal time"]
    assert told.startswith("within 0.6 s") and "`triton` is lower" in told
    told = found["At equal time, slow steps included"]
    assert told.startswith("within 3.6 s") and "`dense` is lower: 1.9000" in told


def test_there_is_no_verdict_where_curves_do_not_meet(said):
    found = said((SPARSE, {"step_s": 0.01}), (DENSE, {"attention": "dense"}))
    assert (
        found["At equal time"]
        == "no verdict: a run is through after 0.1 s, before another is first validated"
    )
    assert found["Along the time"] == "the curves have no stretch in common"
    assert "`triton` is lower" in found["At equal tokens"]


def test_the_lowest_so_far_counts_not_the_last(said):
    found = said(*pair({2: 4.0, 4: 1.0, 8: 3.0}, {2: 4.0, 4: 3.0, 8: 2.0}))
    assert "`triton` is lower: 1.0000" in found["At equal tokens"]
    assert found["Along the tokens"] == (
        "the curve below is that of `triton` from 0.20M tokens to 0.40M tokens, `dense` at 0.80M tokens"
    )


def test_many_crossings_are_counted(said):
    zigzag = {2: 2.9, 4: 3.1, 6: 2.9, 8: 3.1, 10: 2.9, 12: 3.1}
    assert said(*pair(zigzag, dict.fromkeys(zigzag, 3.0)))["Along the tokens"] == (
        "the curves cross 5 times between 0.20M tokens and 1.20M tokens; at the end that of `dense` is below"
    )


def test_seeds_that_disagree_leave_it_open(said):
    dense = {"attention": "dense"}
    found = said(
        (SPARSE, {}), ({2: 4.0, 4: 3.0, 8: 2.6}, {}), (DENSE, dense), ({2: 4.0, 4: 3.0, 8: 2.45}, dense)
    )
    assert "no clear difference" in found["At equal tokens"]
    assert found["Along the tokens"].endswith("by the mean of the seeds")


def test_the_time_to_a_loss_that_all_reach(said):
    # The lowest loss that both reach is dense's 2.5: sparse has it midway between steps 4 and 8.
    found = said(*pair(SPARSE, DENSE))["To the lowest loss that all reach"]
    assert found == (
        "to 2.5000 nats per token `triton` takes 2.5 s and 0.60M tokens, `dense` takes 3.5 s and 0.80M "
        "tokens; `dense` takes 1.40 times as long as `triton` and 1.33 times as many tokens"
    )


def test_kinds_of_token_are_judged_at_the_best_points(said):
    kinds = {"P": -1.0, "L": -0.5, "V": 9.0}
    found = said(*pair({2: 4.0, 4: 2.0, 8: 3.9}, DENSE, kinds=kinds))["By kind of token"]
    assert found == (
        "each run at its best point, `triton` is lower on T, V, structural; `dense` is lower on P; no clear "
        "difference on L"
    )


def test_targets_are_reached_by_all():
    def run(*losses):
        return {"validation": {"val_loss": list(losses)}}

    assert targets([run(3.0, 1.25, 1.5), run(2.9, 1.1)]) == [1.25, 1.3, 1.4, 1.5]
    assert targets([run(3.0, 1.3), run(1.45, 1.2)]) == [1.3, 1.4]  # 1.5 is above the first of the second


# --- whole results --------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two seeds of each attention."""
    return [
        write_run(
            tmp_path / f"{attention}-{seed}",
            {step: loss + 0.05 * seed for step, loss in losses.items()},
            attention=attention,
            seed=seed,
            step_s=step_s,
        )
        for attention, losses, step_s in (("triton", SPARSE, 0.25), ("dense", DENSE, 0.5))
        for seed in (0, 1)
    ]


def test_the_page_has_the_figures(folders):
    text = page(gather(folders), "a.png", "a.json")
    heads = "run parameters tokens epochs steps skipped best at last tokens/s time slow their".split()
    (line,) = re.findall(r"^\| run \| parameters.*$", text, re.M)
    assert [cell.split()[0].rstrip(",") for cell in line.strip("| ").split(" | ")] == heads
    assert (
        "| dense, seed 1 | 17.00M | 800,000 | 2 | 8 | 0 | 2.5500 | 8 | 2.5500 | 200,000 | 3.5 | 1 | 20.0 |"
        in text
    )
    assert "| triton, seed 0 | 2.0000 | 2.0000 | 2.0000 | 2.0000 | 2.0000 | 2.0000 |" in text
    assert "| run | all | T | P | L | V | structural |" in text
    assert "| run | 2.5500: million tokens | 2.5500: s | 2.6000: million tokens | 2.6000: s |" in text
    assert "| triton, seed 0 | 0.58 | 1.2 | 0.56 |" in text
    assert "213 songs (1,266,924 tokens), validated on 27 songs (158,713 tokens)" in text
    assert "2 row(s) of 24,576 tokens per step" in text
    assert (
        "- **At equal tokens:** within 0.80M tokens, by the lowest loss so far, `triton` is lower: 2.0250"
        in text
    )
    assert "every seed of `triton` is below every one of `dense`" in text
    assert "bf16 by 1 process(es) on Test GPU, meloformer 0.1.0, torch 2.11.0" in text
    assert "somewhere" not in text and "](a.png)" in text and "`a.json`" in text


def test_the_table_tells_the_best_point_from_the_last(tmp_path):
    runs = [
        write_run(tmp_path / "a", {2: 4.0, 4: 1.0, 8: 3.0}, kinds={"P": 0.5}, summary={"skipped_steps": 3}),
        write_run(tmp_path / "b", DENSE, attention="dense"),
    ]
    text = page(gather(runs), "a.png", "a.json")
    assert "| triton, seed 0 | 17.00M | 800,000 | 2 | 8 | 3 | 1.0000 | 4 | 3.0000 |" in text
    assert "| triton, seed 0 | 1.0000 | 1.0000 | 1.5000 | 1.0000 | 1.0000 | 1.0000 |" in text


def test_kind_rules_are_compared_as_attentions_are(tmp_path, monkeypatch):
    from benchmarks.learning import chart as learning_picture

    legends = []
    monkeypatch.setattr(learning_picture, "draw_legend", lambda figure, entries: legends.extend(entries))
    rules = {"old": {}, "alike": {"kind_rule": "alike", "seed": 1}, "next": {"kind_rule": "next"}}
    runs = [write_run(tmp_path / name, SPARSE, **more) for name, more in rules.items()]
    runs.append(write_run(tmp_path / "dense", DENSE, attention="dense", kind_rule="alike"))
    result = gather(runs)
    text = page(result, "a.png", "a.json")
    assert re.findall("^## (`.*)$", text, re.M) == [
        "`triton` against `triton, next`", "`triton` against `dense`", "`triton, next` against `dense`",
    ]  # fmt: skip
    assert re.findall(r"^\| (\S.*seed \d) \| 17.00M", text, re.M) == [
        "triton, seed 0", "triton, seed 1", "triton, next, seed 0", "dense, seed 0",
    ]  # fmt: skip
    learning_picture.draw(result, tmp_path / "a.png")
    assert [name for name, _ in legends] == ["triton", "triton, next", "dense"]
    with pytest.raises(UserError, match="both triton, next of seed 0"):
        gather([runs[2], write_run(tmp_path / "again", DENSE, kind_rule="next")])


def test_every_pair_of_attentions_is_judged(folders, tmp_path):
    third = write_run(tmp_path / "flex", SPARSE, attention="flex")
    text = page(gather([*folders, third]), "a.png", "a.json")
    assert re.findall("^## (`.*)$", text, re.M) == [
        "`triton` against `dense`", "`triton` against `flex`", "`dense` against `flex`",
    ]  # fmt: skip


def test_the_picture_draws_every_run_by_tokens_and_by_time(folders, tmp_path, monkeypatch):
    from benchmarks.learning import chart as learning_picture

    figures = []
    monkeypatch.setattr(learning_picture, "save_figure", lambda figure, path: figures.append(figure))
    learning_picture.draw(gather(folders), tmp_path / "a.png")
    by_tokens, by_time = figures[0].axes
    curves = [line for line in by_time.lines if len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in curves[::2]] == [[0.25, 0.75, 1.75], [0.5, 1.5, 3.5]]
    assert [list(line.get_ydata()) for line in curves[::2]] == [list(SPARSE.values()), list(DENSE.values())]
    assert [line.get_color() for line in curves] == [*["#0072B2"] * 2, *["#E69F00"] * 2]
    assert list(by_tokens.lines[0].get_xdata()) == [0.2, 0.4, 0.8]
    assert by_time.get_xlabel().startswith("seconds")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["triton", "dense"]


def test_long_runs_are_drawn_in_minutes(tmp_path, monkeypatch):
    from benchmarks.learning import chart as learning_picture

    figures = []
    monkeypatch.setattr(learning_picture, "save_figure", lambda figure, path: figures.append(figure))
    runs = [write_run(tmp_path / name, SPARSE, attention=name, step_s=60.0) for name in ("triton", "dense")]
    learning_picture.draw(gather(runs), tmp_path / "a.png")
    by_time = figures[0].axes[1]
    assert by_time.get_xlabel().startswith("minutes") and list(by_time.lines[0].get_xdata()) == pytest.approx(
        [1, 3, 7]
    )


def test_page_and_picture_can_be_made_again_without_the_runs(folders, tmp_path, capsys):
    target, again = tmp_path / "new" / "a.md", tmp_path / "again" / "a.md"
    learning.main([*map(str, folders), "--output", str(target)])
    assert json.loads(target.with_suffix(".json").read_text())["format"] == FORMAT
    assert capsys.readouterr().out == target.read_text() + "\n"
    learning.main(["--from", str(target.with_suffix(".json")), "--output", str(again)])
    assert again.read_text() == target.read_text()
    assert again.with_suffix(".png").read_bytes() == target.with_suffix(".png").read_bytes()


OTHER_DATA = {"data": DATA | {"sha256": "def"}}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"summary": OTHER_DATA}, r"b and a do not compare: they differ in data \("),
        ({"summary": {"data": DATA | {"val_split": 0.2}}}, "differ in data"),
        ({"summary": {"device": "Other GPU"}}, r"differ in device \('Other GPU' and 'Test GPU'\)"),
        ({"summary": {"precision": "fp32"}}, "differ in precision"),
        ({"summary": {"processes": 2}}, "differ in processes"),
        ({"summary": {"versions": VERSIONS | {"torch": "2.13.0"}}}, "differ in versions"),
        ({"batch_size": 4}, "differ in batch_size"),
        ({"gradient_accumulation_steps": 1}, "differ in gradient_accumulation_steps"),
        ({"max_seq_len": 2048}, "differ in max_seq_len"),
        ({"learning_rate": 1e-4}, "differ in learning_rate"),
        ({"attention": "triton"}, "b and a are both triton of seed 0|a and b are both triton of seed 0"),
        ({"attention": "triton", "seed": 1}, "all runs are triton"),
        ({"losses": {2: 4.5, 6: 3.2, 8: 2.5}}, "not validated after equal tokens"),
        ({"tokens": 90_000}, "not validated after equal tokens"),
    ],
)
def test_runs_that_do_not_compare_are_refused(tmp_path, changes, says):
    first = write_run(tmp_path / "a", SPARSE)
    changes = {"losses": DENSE, "attention": "dense"} | changes
    second = write_run(tmp_path / "b", **changes)
    with pytest.raises(UserError, match=says):
        gather([first, second])


@pytest.mark.parametrize(
    "changes",
    [{"output_dir": "x", "data_dir": "y"}, {"keep_last": 1, "tensorboard": True}, {"seed": 5}],
    ids=["paths", "what-is-kept", "seed"],
)
def test_what_does_not_change_learning_may_differ(tmp_path, changes):
    first = write_run(tmp_path / "a", SPARSE)
    gather([first, write_run(tmp_path / "b", DENSE, attention="dense", **changes)])


@pytest.mark.parametrize(
    "args, says",
    [
        (["a", "b", "--output", "page.html"], "must end in .md"),
        ([], "give folders"),
        (["a", "--from", "b.json"], "give folders"),
        (["--from", "no.json"], "No such file"),
        (["no", "run"], "cannot read"),
    ],
)
def test_mistakes_are_told(args, says):
    with pytest.raises(UserError, match=says):
        learning.main(args)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"is not a result of benchmarks\.learning"):
        learning.main(["--from", str(tmp_path / "a.json")])


def test_runs_of_the_trainer_are_understood(data, tmp_path):
    """Real logs, configurations and summaries."""
    runs = []
    for attention in ("reference", "dense"):
        runs.append(tmp_path / attention)
        train.train(config(data, runs[-1], attention=attention, validate_every=3), TINY)
    result = gather(runs)
    assert [run["attention"] for run in result["runs"]] == ["reference", "dense"]
    assert all(run["validation"]["tokens"][-1] == run["tokens"] for run in result["runs"])
    assert "`reference` against `dense`" in page(result, "a.png", "a.json")
    assert str(tmp_path) not in json.dumps(result)


def test_the_recipe_in_the_docs_is_what_the_commands_take():
    recipe = DOCS.read_text().split("## What is learned")[1].replace("\\\n", " ")
    (line,) = re.findall(r"python -m meloformer.preprocess (.*)", recipe)
    assert preprocess._arguments(shlex.split(line)).val_split == 0.1
    (line,) = re.findall(r"python -m meloformer.train (.*)", recipe)
    (models,) = re.findall(r"for model in (.*?);", recipe)
    for seed, model in enumerate(shlex.split(models)):
        attention, rule = model.split()
        words = line.replace("$seed", str(seed)).replace("$attention", attention).replace("$rule", rule)
        settings = parse_args(shlex.split(words))
        assert (settings.seed, settings.attention, settings.kind_rule) == (seed, attention, rule)
        chosen_model(settings, SIZES[settings.model_size])  # which refuses what does not go together
