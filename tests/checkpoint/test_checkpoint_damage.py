"""Damaged and hostile checkpoints: one line, and nothing of them is used."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from meloformer.checkpoint.store import load_checkpoint, restore_optimizer
from meloformer.errors import UserError

from helpers.checkpoints import assert_one_line, edit_manifest, make_model, make_optimizer, rewrite


def read_all(path: Path) -> None:
    load_checkpoint(path)
    restore_optimizer(path, make_optimizer(make_model()))


FILES = (
    "model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json", "trainer.json",
    "manifest.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "longer", "folder"])
def test_damage_is_named(saved, name, damage):
    file = saved / name
    data = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 0x80]) + data[middle + 1 :]
        file.write_bytes({"empty": b"", "cut": data[:-7], "flipped": flipped, "longer": data + b"x"}[damage])
    with pytest.raises(UserError) as error:
        read_all(saved)
    assert_one_line(error, name)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: "[]",
        lambda m: "null",
        lambda m: "[" * 100_000,
        lambda m: '{"step": ' + "9" * 5000 + "}",
        lambda m: "\ud800".encode("utf-16", "surrogatepass").decode("latin1"),
        lambda m: m.update(format="other"),
        lambda m: m.update(version=2),
        lambda m: m.update(step="5"),
        lambda m: m.update(step=True),
        lambda m: m.pop("files"),
        lambda m: m.update(files=["model.safetensors"]),
        lambda m: m["files"].pop("config.json"),
        lambda m: m.update(val_loss="low"),
        lambda m: m["files"].update({"../../evil": {"bytes": 0, "sha256": ""}}),
        lambda m: m["files"].update({"config.json": 3}),
        lambda m: m["files"]["config.json"].update(bytes="many"),
        lambda m: m["files"]["config.json"].update(bytes=-1),
        lambda m: m["files"]["config.json"].update(sha256=None),
        lambda m: m["files"]["config.json"].pop("sha256"),
        lambda m: m["files"]["config.json"].update(sha256=[]),
        lambda m: m["files"]["config.json"].update(bytes=["\n"] * 1000),
    ],
    ids=[
        "list", "null", "deep", "huge-number", "not-utf8", "format", "version", "step-text", "step-bool",
        "no-files", "files-list", "file-unlisted", "loss-text", "path-escape", "entry-number", "size-text",
        "size-negative", "hash-null", "hash-absent", "hash-list", "size-list",
    ],
)  # fmt: skip
def test_hostile_manifest(saved, change):
    edit_manifest(saved, change)
    with pytest.raises(UserError) as error:
        load_checkpoint(saved)
    assert_one_line(error, str(saved))


@pytest.mark.parametrize(
    "content", [b"[1, 2]", b"\xff\xfe", b"[" * 100_000, b"7"], ids=["list", "bytes", "deep", "number"]
)
@pytest.mark.parametrize("name", ["config.json", "trainer.json", "tokenizer.json"])
def test_hostile_json_with_a_right_hash(saved, name, content):
    rewrite(saved, name, content)
    with pytest.raises(UserError) as error:
        load_checkpoint(saved)
    assert_one_line(error, name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        (10).to_bytes(8, "little") + b'{"a": 1} xx',
        safetensors.torch.save({"x": torch.zeros(2)}),
        safetensors.torch.save({"x": torch.zeros(2)}, {"param_groups": "[3]", "values": "{}"}),
        safetensors.torch.save({"x.y.z": torch.zeros(2)}, {"param_groups": "[]", "values": "{}"}),
        safetensors.torch.save({"state.0.exp_avg": torch.zeros(2)}, {"param_groups": "[]", "values": "[[]]"}),
    ],
    ids=["empty", "huge-header", "bad-header", "no-metadata", "bad-groups", "bad-name", "bad-values"],
)  # fmt: skip
def test_hostile_optimizer_file_with_a_right_hash(saved, content):
    name = "optimizer.safetensors"
    rewrite(saved, name, content)
    with pytest.raises(UserError) as error:
        restore_optimizer(saved, make_optimizer(make_model()))
    assert_one_line(error, name)


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    for given, text in ((tmp_path, "manifest.json"), (tmp_path / "model.pt", "no such folder")):
        with pytest.raises(UserError) as error:
            load_checkpoint(given)
        assert_one_line(error, str(given), text)
