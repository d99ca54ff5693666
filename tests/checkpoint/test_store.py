"""Saving, choosing and loading checkpoints."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch

from meloformer.checkpoint import files as checkpoint_files
from meloformer.checkpoint import store as checkpoint
from meloformer.checkpoint.store import (
    best_checkpoint,
    export_model,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
)
from meloformer.errors import UserError
from meloformer.files import sha256_of_file
from meloformer.tokens import vocab

from helpers.checkpoints import (
    CONFIG,
    assert_one_line,
    make_model,
    make_optimizer,
    rewrite,
    save,
    steps_in,
    train,
)


def test_round_trip(tmp_path):
    model = make_model()
    path = save(tmp_path / "deep" / "root", 1234, model)
    assert path == tmp_path / "deep" / "root" / "step-00001234"
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.step, loaded.config) == (path, 1234, CONFIG)
    assert loaded.trainer == {"epoch": 1, "row": 17, "seed": 3, "step": 1234}
    assert loaded.tokenizer_json == vocab.to_json()
    assert set(loaded.weights) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.weights[name], tensor) and loaded.weights[name].dtype == tensor.dtype


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
def test_resumed_training_is_bitwise_equal(tmp_path, foreach):
    model = make_model()
    optimizer = make_optimizer(model, foreach=foreach)
    train(model, optimizer, range(5))
    path = save(tmp_path, 5, model, optimizer)
    expected = train(model, optimizer, range(5, 12))

    resumed = make_model()
    train(resumed, make_optimizer(resumed), range(20, 22))  # other weights than the fresh ones
    resumed.load_state_dict(load_checkpoint(path).weights)
    fresh = make_optimizer(resumed, foreach=foreach)
    restore_optimizer(path, fresh)
    assert train(resumed, fresh, range(5, 12)) == expected
    for new, old in zip(resumed.parameters(), model.parameters()):
        assert torch.equal(new, old)


def test_optimizer_groups_come_back_and_machine_options_stay(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["lr"] = 0.123
    path = save(tmp_path, 1, model, optimizer)
    other = make_optimizer(make_model(), fused=None, foreach=True)
    restore_optimizer(path, other)
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.123, (0.9, 0.95), 0.1)
    assert (group["fused"], group["foreach"]) == (None, True)


def test_resuming_survives_the_removal_of_the_checkpoint(saved):
    model = make_model()
    model.load_state_dict(load_checkpoint(saved).weights)
    optimizer = make_optimizer(model)
    restore_optimizer(saved, optimizer)
    for file in saved.iterdir():
        file.write_bytes(b"")
    assert all(loss > 0 for loss in train(model, optimizer, range(2)))


def test_optimizer_without_steps_yet(tmp_path):
    model = make_model()
    path = save(tmp_path, 0, model, make_optimizer(model))
    optimizer = make_optimizer(model)
    restore_optimizer(path, optimizer)
    assert not optimizer.state_dict()["state"]


def test_tied_sliced_and_strided_tensors_are_stored(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {"a": base, "tied": base, "rows": base[1:3], "columns": base.t(), "empty": torch.empty(0)}
    loaded = safetensors.torch.load_file(save(tmp_path, 1, model_state=state) / "model.safetensors")
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_large_weights_are_finite_though_their_sum_is_not(tmp_path):
    model = make_model()
    model.token_embedding.weight.data.fill_(3e38)
    assert load_checkpoint(save(tmp_path, 1, model)).step == 1


def test_nothing_in_a_checkpoint_is_a_pickle(saved):
    assert steps_in(saved) == [
        "config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json",
        "trainer.json",
    ]  # fmt: skip
    for file in saved.glob("*.json"):
        json.loads(file.read_text())
    for file in saved.glob("*.safetensors"):
        safetensors.torch.load_file(file)


def test_all_files_of_a_checkpoint_may_be_read_by_the_same_people(saved):
    """safetensors writes files that their owner alone may read."""
    assert len({file.stat().st_mode for file in saved.iterdir()}) == 1


def test_keep_last(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=2)
    assert steps_in(tmp_path) == ["step-00000020", "step-00000030"]
    save(tmp_path, 40, keep_last=1)
    assert steps_in(tmp_path) == ["step-00000040"]


def test_steps_sort_as_numbers(tmp_path):
    for step in (9, 99_999_999, 123_456_789):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path).name == "step-123456789"


def test_the_best_stays_besides(tmp_path):
    for step, val_loss in enumerate((2.0, None, 1.5, 1.5, None, 3.0, None), 1):
        save(tmp_path, step, keep_last=2, val_loss=val_loss)
    assert steps_in(tmp_path) == ["step-00000004", "step-00000006", "step-00000007"]
    assert best_checkpoint(tmp_path).name == "step-00000004"
    save(tmp_path, 8, keep_last=2, val_loss=1.0)
    assert steps_in(tmp_path) == ["step-00000007", "step-00000008"]


def test_without_a_validation_loss_there_is_no_best(tmp_path):
    save(tmp_path, 1)
    assert best_checkpoint(tmp_path) is None and best_checkpoint(tmp_path / "no") is None


def test_later_ones_go_when_an_earlier_one_was_resumed(tmp_path):
    """They had been found damaged, and would count among the last ones for ever."""
    save(tmp_path, 50)
    save(tmp_path, 40)
    assert steps_in(tmp_path) == ["step-00000040"]
    save(tmp_path, 45)
    assert steps_in(tmp_path) == ["step-00000040", "step-00000045"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, trainer={"epoch": 1})
    path = save(tmp_path, 5, trainer={"epoch": 2}, keep_last=1)
    assert steps_in(tmp_path) == ["step-00000005"]
    assert load_checkpoint(path).trainer["epoch"] == 2


def test_a_replaced_checkpoint_counts_until_its_successor_is_there(tmp_path):
    path = save(tmp_path, 5)
    path.rename(tmp_path / "step-00000005.replaced")
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 5
    save(tmp_path, 5)
    assert steps_in(tmp_path) == ["step-00000005"]


def test_leftovers_are_ignored_and_removed_by_the_next_save(tmp_path):
    path = save(tmp_path, 5)
    leftover = tmp_path / f"{checkpoint._TEMPORARY}step-00000006"
    shutil.copytree(path, leftover)
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_checkpoint(tmp_path) == path
    save(tmp_path, 7)
    assert steps_in(tmp_path) == ["notes.txt", "step-00000005", "step-00000007"]


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "root").write_text("")
    with pytest.raises(UserError) as error:
        save(tmp_path / "root", 1)
    assert_one_line(error, "cannot save a checkpoint")


@pytest.mark.parametrize("arguments", [{"keep_last": 0}, {"step": -1}], ids=str)
def test_senseless_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        save(tmp_path, **{"step": 1, **arguments})


def test_find(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", 5)
    for given in (path, tmp_path / "run" / "checkpoints", tmp_path / "run", str(tmp_path / "run")):
        assert find_checkpoint(given) == path


def test_find_nothing(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "no") is None
    for given in (tmp_path, tmp_path / "no"):
        with pytest.raises(UserError) as error:
            find_checkpoint(given)
        assert_one_line(error, str(given))


def test_the_newest_whole_one_is_taken_and_the_damaged_are_named(tmp_path, capsys):
    good, flipped, cut, lacking = (save(tmp_path, step, keep_last=4) for step in (1, 2, 3, 4))
    (lacking / "config.json").unlink()
    os.truncate(cut / "model.safetensors", 100)
    content = bytearray((flipped / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (flipped / "model.safetensors").write_bytes(content)
    assert latest_checkpoint(tmp_path) == good
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, path, fault in zip(lines, (lacking, cut, flipped), ("missing", "100 bytes", "SHA-256")):
        assert str(path) in line and fault in line


def test_an_export_loads_as_a_checkpoint_and_cannot_resume(saved, tmp_path):
    document = json.loads((saved / "trainer.json").read_text()) | {"identity": {"max_seq_len": 512}}
    rewrite(saved, "trainer.json", json.dumps(document).encode())
    out = tmp_path / "to" / "model"
    (out.parent / ".incomplete-model").mkdir(parents=True)  # an earlier one was killed
    export_model(saved, out)
    assert steps_in(out.parent) == ["model"]
    assert steps_in(out) == [
        "config.json", "manifest.json", "model.safetensors", "tokenizer.json", "trainer.json",
    ]  # fmt: skip
    found, origin = load_checkpoint(find_checkpoint(out)), load_checkpoint(saved)
    assert all(torch.equal(found.weights[name], origin.weights[name]) for name in origin.weights)
    assert (found.config, found.max_seq_len, found.step) == (CONFIG, 512, 2)
    with pytest.raises(UserError, match="no optimizer state"):
        restore_optimizer(out, make_optimizer(make_model()))
    with pytest.raises(UserError, match="exists already"):
        export_model(saved, out)
    with pytest.raises(UserError, match="a checkpoint of a run has such a name"):
        export_model(saved, saved.parent / "step-00000099")


def test_a_checkpoint_that_does_not_tell_its_length(saved):
    with pytest.raises(UserError, match=r"trainer.json is damaged: it lacks max_seq_len"):
        load_checkpoint(saved).max_seq_len  # noqa: B018


def test_checkpoint_without_optimizer_cannot_resume(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(UserError) as error:
        restore_optimizer(path, make_optimizer(make_model()))
    assert_one_line(error, "no optimizer state")


@pytest.mark.parametrize(
    "other, says",
    [
        (lambda: make_optimizer(make_model(dim=6)), "exp_avg has the shape"),
        (lambda: torch.optim.AdamW(make_model().parameters()), "another model"),
    ],
    ids=["shapes", "groups"],
)
def test_optimizer_of_another_model(saved, other, says):
    with pytest.raises(UserError) as error:
        restore_optimizer(saved, other())
    assert_one_line(error, says)


def test_another_tokenizer_is_refused(tmp_path):
    other = vocab.to_json()
    other["tokens"][-1], other["tokens"][-2] = other["tokens"][-2:]
    path = save(tmp_path, 1, tokenizer_json=other)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert_one_line(error, "another token vocabulary", "tokenizer.json")


def test_the_first_token_format_is_refused_by_name(tmp_path):
    path = save(tmp_path, 1, tokenizer_json={**vocab.to_json(), "version": 1})
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert_one_line(error, "version 1 of the token format", "run preprocess again")


def test_resuming_hashes_every_file_once(saved, monkeypatch):
    hashed = []

    def count(path):
        hashed.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr(checkpoint_files, "sha256_of_file", count)
    assert latest_checkpoint(saved.parent) == saved
    load_checkpoint(saved)
    restore_optimizer(saved, make_optimizer(make_model()))
    assert sorted(hashed) == sorted(checkpoint_files.read_manifest(saved)["files"])

    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    (saved / "elsewhere").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (saved / "elsewhere").replace(weights)  # the same name and size, another file
    with pytest.raises(UserError, match=r"model.safetensors is damaged: its SHA-256"):
        load_checkpoint(saved)
