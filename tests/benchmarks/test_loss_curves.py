import json

import pytest

from benchmarks.loss_curves import compare, main
from meloformer.errors import UserError


def write(folder, losses):
    folder.mkdir()
    lines = [{"step": step, "loss": loss} for step, loss in losses.items()] + [{"step": 2, "val_loss": 1.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_differences_are_relative_and_of_shared_steps():
    result = compare({1: 4.0, 2: 3.0, 3: 1.0}, {1: 4.0, 2: 2.0})
    assert result["steps"] == [1, 2]
    assert result["relative_difference"] == {"mean": 0.25, "max": 0.5}


def test_command_writes_figures_and_a_picture(tmp_path, capsys):
    runs = [write(tmp_path / name, {1: 4.0, 2: loss}) for name, loss in (("a", 3.0), ("b", 3.3))]
    main([*runs, "--output", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["runs"] == ["a", "b"]
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "2 steps" in capsys.readouterr().out


def test_a_run_without_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out.json")])
