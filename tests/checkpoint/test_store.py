import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    save_checkpoint,
)
from meloformer.errors import UserError
from meloformer.tokens import vocab

CONFIG = {"dim": 8, "layers": 1}


def make_model(dim: int = 8) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(dim, 16), torch.nn.Tanh(), torch.nn.Linear(16, dim))


def make_optimizer(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **{"fused": False, **options})


def train(model, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, model[0].in_features, generator=generator)
        loss = (model(x) - x.roll(1, -1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(root: Path, step: int, model=None, optimizer=None, keep_last: int = 3, **replaced) -> Path:
    model = model or make_model()
    arguments = {
        "model_state": model.state_dict(),
        "config": CONFIG,
        "tokenizer_json": vocab.to_json(),
        "optimizer_state": optimizer.state_dict() if optimizer else None,
        "trainer": {"epoch": 1, "row": 17, "seed": 3},
        "keep_last": keep_last,
    }
    return save_checkpoint(root, step, **{**arguments, **replaced})


def steps_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint with optimizer state after two steps."""
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(2))
    return save(tmp_path, 2, model, optimizer)


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
    loaded = load_checkpoint(save(tmp_path, 1, model_state=state)).weights
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_dtypes(tmp_path, dtype):
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    loaded = load_checkpoint(save(tmp_path, 1, model_state={"x": tensor})).weights["x"]
    assert loaded.dtype == dtype and torch.equal(loaded, tensor)


def test_nothing_in_a_checkpoint_is_a_pickle(saved):
    assert steps_in(saved) == [
        "config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json",
        "trainer.json",
    ]  # fmt: skip
    for file in saved.glob("*.json"):
        json.loads(file.read_text())
    for file in saved.glob("*.safetensors"):
        safetensors.torch.load_file(file)


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


def test_a_failed_save_leaves_the_others_and_no_leftover(tmp_path, monkeypatch):
    path = save(tmp_path, 5, keep_last=1)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError) as error:
        save(tmp_path, 6, keep_last=1)
    assert_one_line(error, "No space left", str(tmp_path))
    assert steps_in(tmp_path) == [path.name]
    assert load_checkpoint(path).step == 5


def test_a_disk_too_full_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    path = save(tmp_path, 5, keep_last=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 << 20))
    monkeypatch.setattr(checkpoint, "save_file", None)
    with pytest.raises(UserError) as error:
        save(tmp_path, 6, keep_last=1)
    assert_one_line(error, "it needs 0.02 GB of disk, and 0.00 are free", str(tmp_path))
    assert latest_checkpoint(tmp_path) == path and steps_in(tmp_path) == [path.name]


class Crash(BaseException):
    """What no code catches, as the end of a process."""


@pytest.mark.parametrize("again", [False, True], ids=["next-step", "same-step"])
def test_a_crash_at_any_step_of_a_save_loses_nothing(tmp_path, monkeypatch, again):
    """Crashes before each operation on the disk, and in the middle of deleting a folder."""
    rmtree = shutil.rmtree
    crash_at, calls = 0, 0

    def crashing(operation):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == crash_at and operation is rmtree:
                next(Path(arguments[0]).iterdir()).unlink()
            if calls == crash_at:
                raise Crash
            return operation(*arguments, **options)

        return call

    while True:
        crash_at, calls, root = crash_at + 1, 0, tmp_path / str(crash_at)
        save(root, 4)
        save(root, 5)
        with monkeypatch.context() as patched:
            for name in ("rename", "mkdir", "write_bytes"):
                patched.setattr(Path, name, crashing(getattr(Path, name)))
            patched.setattr(shutil, "rmtree", crashing(rmtree))
            patched.setattr(checkpoint, "save_file", crashing(checkpoint.save_file))
            try:
                path = save(root, 5 if again else 6, keep_last=1)
                break
            except Crash:
                assert load_checkpoint(latest_checkpoint(root)).step >= 5
        assert save(root, 7, keep_last=1) and steps_in(root) == ["step-00000007"]
    assert crash_at > 8 and steps_in(root) == [path.name]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_file_reaches_the_disk_before_the_rename(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda *a: (events.append("rename"), rename(*a))[1])
    model = make_model()
    path = save(tmp_path, 1, model, make_optimizer(model))
    names = [Path(event).name for event in events]
    before, after = names[: names.index("rename")], names[names.index("rename") + 1 :]
    assert sorted(before[:-1]) == sorted(file.name for file in path.iterdir())
    assert before[-2] == "manifest.json" and before[-1].endswith("step-00000001")
    assert after == [tmp_path.name]


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
    (saved / "trainer.json").write_text(json.dumps(document))
    edit_manifest(
        saved, lambda m: m["files"].update({"trainer.json": checkpoint_files.seal(saved / "trainer.json")})
    )
    out = tmp_path / "to" / "model"
    export_model(saved, out)
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


def test_a_checkpoint_that_does_not_tell_its_length(saved):
    with pytest.raises(UserError, match=r"trainer.json is damaged: it lacks max_seq_len"):
        load_checkpoint(saved).max_seq_len  # noqa: B018


def test_checkpoint_without_optimizer_cannot_resume(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(UserError) as error:
        restore_optimizer(path, make_optimizer(make_model()))
    assert_one_line(error, "no optimizer state")


@pytest.mark.parametrize(
    "other",
    [lambda: make_optimizer(make_model(dim=6)), lambda: torch.optim.AdamW(make_model().parameters())],
    ids=["shapes", "groups"],
)
def test_optimizer_of_another_model(saved, other):
    with pytest.raises(UserError) as error:
        restore_optimizer(saved, other())
    assert_one_line(error, "another model")


def test_another_tokenizer_is_refused(tmp_path):
    other = vocab.to_json()
    other["tokens"][-1], other["tokens"][-2] = other["tokens"][-2:]
    path = save(tmp_path, 1, tokenizer_json=other)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert_one_line(error, "another token vocabulary", "tokenizer.json")


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


def edit_manifest(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    text = change(manifest)
    (path / "manifest.json").write_text(text if isinstance(text, str) else json.dumps(manifest))


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
    ],
    ids=[
        "list", "null", "deep", "huge-number", "not-utf8", "format", "version", "step-text", "step-bool",
        "no-files", "files-list", "file-unlisted", "loss-text", "path-escape", "entry-number", "size-text",
        "size-negative", "hash-null", "hash-absent",
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
    (saved / name).write_bytes(content)
    edit_manifest(saved, lambda m: m["files"].update({name: checkpoint_files.seal(saved / name)}))
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
    (saved / name).write_bytes(content)
    edit_manifest(saved, lambda m: m["files"].update({name: checkpoint_files.seal(saved / name)}))
    with pytest.raises(UserError) as error:
        restore_optimizer(saved, make_optimizer(make_model()))
    assert_one_line(error, name)


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    for given, text in ((tmp_path, "manifest.json"), (tmp_path / "model.pt", "no such folder")):
        with pytest.raises(UserError) as error:
            load_checkpoint(given)
        assert_one_line(error, str(given), text)


# One process imports torch; its forks save in a loop and are killed, and it looks at what they left.
KILLS = """
import os, random, signal, sys, time
import torch
from meloformer import vocab
from meloformer.checkpoint.store import latest_checkpoint, load_checkpoint, restore_optimizer, save_checkpoint

torch.set_num_threads(1)
root, kills = sys.argv[1], int(sys.argv[2])
model = torch.nn.Linear(256, 256)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(256)).sum().backward()
optimizer.step()

def save(step):
    save_checkpoint(root, step, model_state=model.state_dict(), config={"step": step},
        tokenizer_json=vocab.to_json(), optimizer_state=optimizer.state_dict(), trainer={}, keep_last=1)

def incomplete():
    return [name for name in os.listdir(root) if name.startswith(".incomplete-")]

delays = random.Random(0)
started = time.monotonic()
save(0)
took = time.monotonic() - started
latest = moments = 0
for _ in range(kills):
    seen, begun, wanted = {*incomplete()}, 0, delays.randint(1, 3)
    child = os.fork()
    if child == 0:
        for step in range(latest, latest + 10_000):  # the first one replaces a checkpoint of its step
            save(step)
    while begun < wanted and time.monotonic() - started < 240:  # however busy the machine is
        now = {*incomplete()}
        begun, seen = begun + len(now - seen), now
        time.sleep(0.001)
    time.sleep(delays.random() * 1.5 * took)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "a save failed"
    moments += bool(incomplete())
    checkpoint = load_checkpoint(latest_checkpoint(root))
    assert checkpoint.step >= latest and checkpoint.config == {"step": checkpoint.step}
    restore_optimizer(checkpoint.path, optimizer)
    latest = checkpoint.step
print(latest, moments)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "60"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    latest, cut_short = map(int, done.stdout.split())
    assert latest > 0 and cut_short >= 10, "the kills missed the saves"


@pytest.mark.parametrize("broken", [False, True])
def test_what_a_killed_save_had_replaced_does_not_stop_the_next(tmp_path, monkeypatch, broken):
    """Killed between its new checkpoint and the removal of the one before, of the same step."""
    good = save(tmp_path, 3)
    shutil.copytree(good, tmp_path / f"{good.name}.replaced")
    if broken:
        (good / "model.safetensors").write_bytes(b"")
    with monkeypatch.context() as patch:
        rename = Path.rename
        patch.setattr(Path, "rename", lambda path, to: rename(path, to) if to != good else _full())
        with pytest.raises(UserError, match="No space"):
            save(tmp_path, 3)
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 3
    save(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert load_checkpoint(good).step == 3


def _full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_best_checkpoint_stays_though_it_was_just_being_replaced(tmp_path):
    """Killed between the two renames, and trained on from there."""
    best = save(tmp_path, 3, val_loss=0.05)
    best.rename(tmp_path / f"{best.name}.replaced")
    newest = save(tmp_path, 4, val_loss=0.9, keep_last=1)
    assert {path.name for path in tmp_path.iterdir()} == {best.name, newest.name}
    assert best_checkpoint(tmp_path) == best


def test_a_checkpoint_that_was_moved_and_linked_can_be_replaced_and_removed(tmp_path):
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save(root, 3).rename(elsewhere)
    (root / "step-00000003").symlink_to(elsewhere)
    save(root, 3)
    save(root, 4, keep_last=1)
    assert [path.name for path in root.iterdir()] == ["step-00000004"]
    assert load_checkpoint(elsewhere).step == 3
