import dataclasses
import json

import pytest
import yaml

from meloformer.data.augment import OFF, Augmentation
from meloformer.errors import UserError
from meloformer.training.config import TrainConfig, chosen_model, make_parser, parse_args, save_config

from helpers.tiny_train import TINY


def test_the_flags_of_the_original_are_taken_either_way():
    found = parse_args(
        "--data_dir d --model_size small --max_seq_len 2048 --max_bars 128 --max_samples 50 --batch_size 1 "
        "--gradient-accumulation-steps 4 --learning-rate 3e-4 --epochs 1".split()
    )
    assert found == TrainConfig(
        data_dir="d",
        model_size="small",
        max_seq_len=2048,
        max_bars=128,
        max_samples=50,
        batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=3e-4,
        epochs=1,
    )


def test_flags_and_settings_are_the_same():
    flags = {action.dest for action in make_parser()._actions} - {"help", "config"}
    assert flags == {field.name for field in dataclasses.fields(TrainConfig)}
    assert parse_args(["--data_dir", "d"]) == TrainConfig(data_dir="d")


FILES = {
    "run.yaml": "data_dir: d  # a comment\nlearning_rate: 3e-4\nbatch-size: 2\ntensorboard: true\nseed: null",
    "run.json": json.dumps(
        {"data_dir": "d", "learning_rate": 3e-4, "batch_size": 2, "tensorboard": True}, indent="\t"
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_settings_and_flags_go_before_it(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name])
    expected = TrainConfig(data_dir="d", learning_rate=3e-4, batch_size=2, tensorboard=True)
    assert parse_args(["--config", str(path)]) == expected
    flags = ["--batch_size=7", "--no-tensorboard", "--config", str(path), "--data_dir", "e"]
    assert parse_args(flags) == dataclasses.replace(expected, data_dir="e", batch_size=7, tensorboard=False)


def test_a_saved_configuration_is_taken_back(tmp_path):
    config = TrainConfig(
        data_dir="some: 'odd' folder", learning_rate=1e-9, deterministic=True, compile=False, wandb="no",
        max_samples=3, kind_rule="next", near_bars="0,3", resume="auto", dry_run=True,
    )  # fmt: skip
    save_config(config, tmp_path / "config.yaml")
    found = parse_args(["--config", str(tmp_path / "config.yaml")])
    assert found == dataclasses.replace(config, resume=None, dry_run=False)


def test_the_model_has_the_attention_that_was_asked_for():
    assert chosen_model(TrainConfig(data_dir="d"), TINY) == TINY and TINY.kind_rule == "any"
    found = chosen_model(parse_args("--data_dir d --kind_rule next".split()), TINY)
    assert found == dataclasses.replace(TINY, kind_rule="next")
    found = chosen_model(parse_args("--data_dir d --near_bars 4,0,1".split()), TINY)
    assert found == dataclasses.replace(TINY, near_bars=(0, 1, 4))
    assert chosen_model(TrainConfig(data_dir="d", attention="dense"), TINY) == TINY.as_dense()
    with pytest.raises(UserError, match="--kind_rule next: not with --attention dense"):
        chosen_model(TrainConfig(data_dir="d", attention="dense", kind_rule="next"), TINY)
    with pytest.raises(UserError, match="--near_bars 0: not with --attention dense"):
        chosen_model(TrainConfig(data_dir="d", attention="dense", near_bars="0"), TINY)


def test_augmentation_is_on_unless_turned_off():
    def found(*flags):
        return parse_args(["--data_dir", "d", *flags]).augmentation

    assert found() == Augmentation(transpose=6, velocity=2, tempo=10, band_order=True)
    flags = "--augment_transpose 0 --augment_velocity=1 --augment-tempo 50 --no_augment_band_order".split()
    assert found(*flags) == Augmentation(transpose=0, velocity=1, tempo=50, band_order=False)
    assert found("--no_augment", *flags) == OFF


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--augment_transpose=7", "7 is not at most 6"),
        ("--augment_velocity=32", "32 is not at most 31"),
        ("--augment_tempo=-1", "-1 is not at least 0"),
        ("--augment_tempo=2.5", "'2.5' is not a whole number"),
    ],
)
def test_augmentation_out_of_range_is_refused_in_one_line(capsys, flag, says):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--data_dir", "d", flag])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1 and says in told


@pytest.mark.parametrize(
    "text, says",
    [
        ("batchsize: 2", "no setting 'batchsize'; did you mean 'batch_size'?"),
        ("config: other.yaml", "no setting 'config'"),
        ("7: 8", "no setting '7'"),
        ("- data_dir", "'name: value'"),
        ("", "'name: value'"),
        ("data_dir: [a", "neither YAML nor JSON"),
        ("a: !!python/object/apply:os.getcwd []", "neither YAML nor JSON"),
        ("data_dir: \x00", "neither YAML nor JSON"),
        ("data_dir: {a: b}", "'data_dir' must be one number or text"),
        ("deterministic: 1", "'deterministic' must be true or false"),
        ("data_dir: true", "'data_dir' must be one number or text"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, says):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse_args(["--config", str(path), "--data_dir", "d"])
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no.yaml: No such file"):
        parse_args(["--config", str(tmp_path / "no.yaml")])


def test_values_of_a_file_are_held_to_the_rules_of_flags(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data_dir": "d", "batch_size": 0}))
    with pytest.raises(SystemExit):
        parse_args(["--config", str(tmp_path / "run.yaml")])
    assert "--batch_size: 0 is not at least 1" in capsys.readouterr().err
