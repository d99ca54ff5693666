"""State sharding: the same training, checkpoints of one format, faults met together, whole graphs."""

import itertools
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from miditoolkit.midi.utils import example_midi_file
from safetensors import safe_open
from torch._dynamo.testing import CompileCounterWithBackend

from meloformer import export, train
from meloformer.checkpoint.store import latest_checkpoint, load_checkpoint
from meloformer.generate import main as generate_command
from meloformer.model.transformer import MeloFormer
from meloformer.stop import STOPPED
from meloformer.training.distributed import Job, full_tensor, shard_model

from helpers.compiled_layers import (
    RECOMPUTING,
    SPARSE,
    SUMMARIES,
    AnySummaries,
    StaticAttention,
    batches,
    step,
)
from helpers.shared_work import once
from helpers.tiny_train import TINY
from helpers.training import (
    TINY_TRAIN,
    arguments,
    assert_same_run,
    config,
    fault,
    forked,
    losses,
    records,
    run,
    spec,
)

STEPS = 6


SHARDED = ["--shard_state"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Runs of two processes, by name: their folder, and exit codes and output of each start."""
    starts = [
        start("plain"),
        start("sharded", *SHARDED, sample_every=STEPS),
        start("bf16", precision="bf16"),
        start("sharded bf16", *SHARDED, precision="bf16"),
        start("recomputed", *SHARDED, checkpoint_activations="layer"),
        start("stopped", *SHARDED, faults=[fault("SIGTERM", 2, rank=1)]),
        start("stopped", *SHARDED, "--resume"),
        start("changed", *SHARDED, faults=[fault("SIGTERM", 1, rank=1)]),
        start("changed", "--resume", world=1, faults=[fault("SIGTERM", 3)]),
        start("changed", *SHARDED, "--resume"),
        start("dry", *SHARDED, "--dry_run"),
    ]
    return once(tmp_path_factory, "sharded", lambda folder: make_runs(data, folder, starts))


@pytest.fixture(scope="module")
def tuned_runs(data, tmp_path_factory):
    """The same of a run, and of runs that begin with its weights; one of them is extended."""

    def make(folder):
        tuned = [*SHARDED, "--init_from", str(folder / "first"), "--resume"]
        starts = [
            start("first", *SHARDED, max_steps=2),
            start("alone", *tuned, world=1, max_steps=2),
            start("sharded", *tuned, max_steps=2),
            start("sharded", *tuned, max_steps=3),
        ]
        return make_runs(data, folder, starts)

    return once(tmp_path_factory, "tuned", make)


@pytest.fixture(scope="module")
def not_finite_runs(data, tmp_path_factory):
    """The same of runs that meet numbers that are not finite: by another test process at the same time."""
    every_step = {"save_every": 1, "keep_last": STEPS}
    starts = [
        start("nan loss", *SHARDED, faults=[fault("nan loss", 3, rank=1)], **every_step),
        start("inf gradient", *SHARDED, faults=[fault("inf gradient", 3, rank=1)], **every_step),
        start("inf weight", *SHARDED, faults=[fault("inf weight", 1, rank=1)], save_every=1),
    ]
    return once(tmp_path_factory, "not-finite", lambda folder: make_runs(data, folder, starts))


def start(name, *more, world=2, faults=(), **changes):
    """One start of the run of that name, for `make_runs`."""
    rows = {"gradient_accumulation_steps": 4 // world, "max_steps": STEPS, "epochs": 4}
    return name, world, {**rows, **changes}, more, faults


def make_runs(data, folder, starts):
    specs = [
        spec(world, *arguments(data, **settings), "--output_dir", folder / name, *more, faults=faults)
        for name, world, settings, more, faults in starts
    ]
    told = {}
    for (name, *_), result in zip(starts, forked("runs", *specs)):
        told.setdefault(name, []).append(result)
    return {name: (folder / name, results) for name, results in told.items()}


def codes(results):
    return [result["codes"] for result in results]


def outputs(results):
    """All of it, which pytest would cut short."""
    return "\n".join(result["output"] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize(
    "one, other, tolerance",
    [("plain", "sharded", 1e-5), ("sharded", "recomputed", 1e-5), ("bf16", "sharded bf16", 1e-4)],
    ids=lambda value: str(value),
)
def test_sharded_training_is_the_same_training(runs, one, other, tolerance):
    (folder, told), (other_folder, other_told) = runs[one], runs[other]
    assert codes(told) == codes(other_told) == [[0, 0]], other_told[0]["output"]
    assert len(losses(folder)) == STEPS
    for name in ("loss", "grad_norm", "val_loss", "val_loss_P"):
        expected = [record[name] for record in records(folder, name)]
        found = [record[name] for record in records(other_folder, name)]
        assert expected and found == pytest.approx(expected, rel=tolerance), name


@pytest.mark.slow
def test_it_says_so_and_samples(runs):
    folder, told = runs["sharded"]
    assert "2 process(es), state sharded" in told[0]["output"]
    assert "Warning" not in told[0]["output"]
    assert (folder / "samples" / f"step-{STEPS:08d}.mid").exists() or "has no note" in told[0]["output"]


@pytest.mark.slow
def test_a_dry_run_measures_a_step(runs):
    folder, told = runs["dry"]
    assert codes(told) == [[0, 0]] and "s per step, measured on one" in told[0]["output"], outputs(told)
    assert not folder.exists()


@pytest.mark.slow
def test_a_stopped_run_is_resumed_bit_for_bit(runs):
    folder, told = runs["stopped"]
    assert codes(told) == [[STOPPED, STOPPED], [0, 0]], outputs(told)
    assert "resuming after step 3" in told[1]["output"]
    assert_same_run(runs["sharded"][0], folder)


@pytest.mark.faults
def test_fine_tuning_and_extending_are_the_same_with_a_sharded_state(tuned_runs):
    (folder, told), (alone, told_alone) = tuned_runs["sharded"], tuned_runs["alone"]
    assert codes(told) == [[0, 0], [0, 0]] and codes(told_alone) == [[0]], outputs(told)
    for line in (
        "beginning with the weights of",
        "is extended from 2 to 3 steps",
        ": not used, since the run",
    ):
        assert "".join(result["output"] for result in told).count(line) == 1
    assert losses(folder)[:2] == pytest.approx(losses(alone), rel=1e-5) and len(losses(folder)) == 3
    assert losses(folder)[0] < losses(tuned_runs["first"][0])[0] - 0.1


@pytest.mark.slow
def test_checkpoints_do_not_tell_whether_and_over_how_many_the_state_was_sharded(runs):
    folder, told = runs["changed"]
    assert codes(told) == [[STOPPED, STOPPED], [STOPPED], [0, 0]], outputs(told)
    assert "resuming after step 2" in told[1]["output"] and "resuming after step 4" in told[2]["output"]
    assert losses(folder) == pytest.approx(losses(runs["plain"][0]), rel=1e-4)
    newest = [latest_checkpoint(runs[name][0] / "checkpoints") for name in ("plain", "sharded", "changed")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        plain, *others = (_shapes(path / file) for path in newest)
        assert others == [plain, plain]


def _shapes(file):
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}


@pytest.mark.slow
def test_an_export_of_a_sharded_run_generates(runs, tmp_path):
    export.main(["--checkpoint", str(runs["sharded"][0]), "--output", str(tmp_path / "model")])
    args = ["--checkpoint", tmp_path / "model", "--output", tmp_path / "song.mid", "--max_tokens", "20"]
    # Whether a model of six steps writes a note is chance: it goes on with a song that has some.
    args += ["--prompt", example_midi_file(), "--prompt_bars", "1"]
    generate_command([str(arg) for arg in args])
    assert (tmp_path / "song.mid").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nan loss", "inf gradient"])
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(not_finite_runs, what):
    folder, told = not_finite_runs[what]
    assert codes(told) == [[0, 0]], outputs(told)
    found = [record.get("skipped", False) for record in records(folder)]
    assert found == [False] * 3 + [True] + [False] * 2
    weights = {s: load_checkpoint(folder / "checkpoints" / f"step-{s:08d}").weights for s in (3, 4, 5)}
    assert all(torch.equal(weights[3][name], weights[4][name]) for name in weights[3])
    assert not any(torch.equal(weights[4][name], weights[5][name]) for name in weights[3])


@pytest.mark.slow
def test_weights_that_are_not_finite_in_the_share_of_another_process_are_not_saved(not_finite_runs):
    folder, told = not_finite_runs["inf weight"]
    assert codes(told)[0][0] == 3 and codes(told)[0][1] != 0, outputs(told)
    assert "the weights are not finite after step 2" in told[0]["output"]
    assert latest_checkpoint(folder / "checkpoints").name == "step-00000001"


@pytest.mark.slow
def test_gradients_are_exchanged_once_a_step_and_each_process_holds_a_share(data, tmp_path):
    args = arguments(data, max_grad_norm=1e9, max_seq_len=1024)
    forked("gradients", tmp_path, "1x4x1 2x2x1", *args, "--shard_state")  # one process shares nothing
    found, header = {}, {}
    for shape in ("1x4x1", "2x2x1"):
        with safe_open(tmp_path / f"{shape}.safetensors", "pt") as opened:
            found[shape] = {name: opened.get_tensor(name) for name in opened.keys()}
            header[shape] = opened.metadata()
    for name, gradient in found["1x4x1"].items():
        assert (found["2x2x1"][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    # What a process has of a gradient before it is exchanged is no gradient of its share.
    assert json.loads(header["2x2x1"]["present"]) == [0, len(found["2x2x1"])]
    assert int(header["2x2x1"]["held"]) / int(header["1x4x1"]["held"]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.faults
def test_two_launchers_meet_as_on_two_machines_and_one_process_speaks(runs, data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-id=run", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meeting]
    words = arguments(data, max_steps=STEPS, epochs=4)
    command = [*launcher, TINY_TRAIN, *words, "--output_dir", tmp_path, "--shard_state"]
    with ThreadPoolExecutor() as machines:
        told = list(machines.map(run, [command, command]))
    assert [done.returncode for done in told] == [0, 0], [done.stderr for done in told]
    assert [bool(done.stdout) for done in told].count(True) == 1
    assert losses(tmp_path) == pytest.approx(losses(runs["plain"][0]), rel=1e-5)


@pytest.fixture
def alone():
    """A process group of this process."""
    torch._dynamo.reset()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield Job(0, 1, torch.device("cpu"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recompute", RECOMPUTING)
def test_sharded_layers_are_compiled_once_as_whole_graphs(alone, recompute):
    torch.manual_seed(0)
    model, plain = MeloFormer(SPARSE, recompute), MeloFormer(SPARSE)
    plain.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_layers(backend=counter)
    shard_model(model, alone)
    for number, (packed, ids) in enumerate(batches(8)):
        attention = StaticAttention(packed)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            nats, gradients = step(model, packed, ids, attention)
        expected, others = step(plain, packed, ids, attention)
        torch.testing.assert_close(nats, expected)
        for got, want in itertools.zip_longest(gradients, others):
            torch.testing.assert_close(full_tensor(got), want, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 2


@pytest.mark.parametrize("recompute", RECOMPUTING)
def test_sharded_layers_are_compiled_once_for_any_number_of_summaries(alone, recompute):
    model = MeloFormer(SPARSE, recompute)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_layers(backend=counter)
    shard_model(model, alone)
    for number, summaries in enumerate((SUMMARIES, 64, 80, 128, SUMMARIES)):
        packed, ids = next(batches(1, summaries=summaries))
        step(model, packed, ids, AnySummaries())
        if not number:
            first = counter.frame_count
    assert counter.frame_count == first


def test_one_process_has_nothing_to_share(data, tmp_path):
    train.train(config(data, tmp_path / "plain", max_steps=2), TINY)
    train.train(config(data, tmp_path / "sharded", max_steps=2, shard_state=True), TINY)
    assert_same_run(tmp_path / "plain", tmp_path / "sharded")


@pytest.mark.gpu
@pytest.mark.slow
def test_two_gpus_share_the_state_of_compiled_layers(data, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def start(processes, output, *more, steps=6):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        rows = {"gradient_accumulation_steps": 4 // processes, "max_steps": steps, "learning_rate": 1e-3}
        words = arguments(data, **{**rows, "device": "cuda", "attention": "auto", "save_every": 3})
        command = [*launcher, f"--nproc_per_node={processes}", "-m", "meloformer.train", *words]
        done = run([*command, "--output_dir", tmp_path / output, *more])
        assert done.returncode == 0, done.stderr

    start(2, "plain")
    start(2, "sharded", "--shard_state")
    # The runs differ in the order of sums, and so in which weights bf16 rounds up: by 2^-8 of a weight.
    expected = pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    assert losses(tmp_path / "sharded") == expected
    third = tmp_path / "sharded" / "checkpoints" / "step-00000003"
    for processes, more in ((1, []), (2, []), (2, ["--shard_state"])):
        output = f"from 3, {processes} {more}"
        start(processes, output, "--resume", third, *more)
        assert losses(tmp_path / output) == pytest.approx(losses(tmp_path / "plain")[3:], rel=1e-3)
