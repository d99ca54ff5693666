import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.learning import __main__ as learning
from benchmarks.learning.__main__ import FORMAT, gather
from benchmarks.learning.page import page
from meloformer import preprocess, train
from meloformer.errors import UserError
from meloformer.model.transformer import SIZES
from meloformer.training.config import chosen_model, parse_args

from helpers.learning_runs import DATA, DENSE, SPARSE, VERSIONS, two_seeds_of_each, write_run
from helpers.tiny_train import TINY
from helpers.training import config

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def test_page_and_chart_can_be_made_again_without_the_runs(tmp_path, capsys):
    folders = two_seeds_of_each(tmp_path / "runs")
    target, again = tmp_path / "new" / "a.md", tmp_path / "again" / "a.md"
    learning.main([*map(str, folders), "--output", str(target)])
    assert json.loads(target.with_suffix(".json").read_text())["format"] == FORMAT
    assert capsys.readouterr().out == target.read_text() + "\n"
    learning.main(["--from", str(target.with_suffix(".json")), "--output", str(again)])
    assert again.read_text() == target.read_text()
    assert again.with_suffix(".png").read_bytes() == target.with_suffix(".png").read_bytes()


def test_runs_are_added_to_those_of_a_result(tmp_path):
    folders = two_seeds_of_each(tmp_path / "runs")
    earlier, toy = tmp_path / "earlier.json", {"INST": {"fixed": 0.5}}
    earlier.write_text(json.dumps(gather(folders[:3]) | {"toy": toy}))
    assert gather([earlier, folders[3]]) == gather(folders) | {"toy": toy}
    with pytest.raises(UserError, match="are both triton of seed 0"):
        gather([earlier, folders[0]])


@pytest.mark.parametrize("name", ["learning_small_h200.md", "learning_base_h200.md"])
def test_the_projects_own_pages_are_made_of_their_results(tmp_path, name):
    committed = DOCS.parents[1] / "benchmarks" / "results" / name
    target = tmp_path / committed.name
    learning.main(["--from", str(committed.with_suffix(".json")), "--output", str(target)])
    assert target.read_text() == committed.read_text()


OTHER_DATA = {"data": DATA | {"sha256": "def"}}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"summary": OTHER_DATA}, r"b and a cannot be compared: they differ in data \("),
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
    text = page(result, "a.png", "a.json")
    assert "| reference, any, near 0 1 | 1 | " in text and "| dense | 1 | " in text
    assert str(tmp_path) not in json.dumps(result)


def test_the_toy_stands_beside_runs_of_the_same_songs(data, tmp_path):
    runs = []
    for attention in ("reference", "dense"):
        runs.append(tmp_path / attention)
        settings = config(data, runs[-1], attention=attention, epochs=1, max_steps=2, validate_every=1)
        train.train(settings, TINY)
    target = tmp_path / "page.md"
    learning.main([*map(str, runs), "--data", str(data), "--output", str(target)])
    toy = json.loads(target.with_suffix(".json").read_text())["toy"]
    text = target.read_text()
    for kind in ("fixed", "fitted"):
        (row,) = re.findall(rf"\| toy, {kind}, given the family \|(.*)\n", text)
        assert f"{toy[kind]['CHORD']:.4f}" in row and f"{toy[kind]['INST']:.4f}" in row
        assert len(re.findall(r"\d\.", row)) == 2
    assert "| reference, any, near 0 1, seed 0, given the family | - | - |" in text
    learning.main(
        ["--from", str(target.with_suffix(".json")), "--output", str(tmp_path / "again" / "page.md")]
    )
    assert (tmp_path / "again" / "page.md").read_text() == text


def test_the_toy_is_refused_on_other_songs(data, tmp_path):
    folders = two_seeds_of_each(tmp_path / "runs")
    args = [*map(str, folders), "--output", str(tmp_path / "page.md")]
    with pytest.raises(UserError, match="holds other songs than those that the runs were trained on"):
        learning.main([*args, "--data", str(data)])
    with pytest.raises(UserError, match="--data: the result file of --from has the toy's figures"):
        learning.main(["--from", "a.json", "--data", str(data)])


def test_the_recipe_in_the_docs_is_what_the_commands_take():
    recipe = DOCS.read_text().split("## What is learned")[1].replace("\\\n", " ")
    (line,) = re.findall(r"python -m meloformer.preprocess (.*)", recipe)
    assert preprocess._arguments(shlex.split(line)).val_split == 0.1
    (line,) = re.findall(r"python -m meloformer.train (.*)", recipe)
    (models,) = re.findall(r"for model in (.*?);", recipe)
    for seed, model in enumerate(shlex.split(models)):
        attention, rule, near = model.split()
        words = line.replace("$seed", str(seed)).replace("$attention", attention).replace("$rule", rule)
        settings = parse_args(shlex.split(words.replace("$near", near)))
        assert (settings.seed, settings.attention, settings.kind_rule) == (seed, attention, rule)
        assert settings.near_bars == near
        chosen_model(settings, SIZES[settings.model_size])  # which refuses what does not go together
