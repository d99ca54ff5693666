"""Training on GPUs: compiled layers around the real kernels, one GPU and two."""

import json
import math

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import train as train_benchmark
from benchmarks.common.compile_counts import count_compilations
from meloformer.data.batches import Batch
from meloformer.kernels import plan
from meloformer.model.transformer import SIZES
from meloformer.stop import STOPPED
from meloformer.training.distributed import Job
from meloformer.training.replay import Replayed
from meloformer.training.stepper import Stepper

from helpers.attention_cases import check_error
from helpers.plan_cases import DEVICE
from helpers.random_batches import LENGTH, SUMMARIES, make_batch, varied
from helpers.tiny_train import TINY_BASE
from helpers.training import (
    FORKED_TRAIN,
    arguments,
    config,
    fault,
    read_gradients,
    records,
    run,
    tiny,
    torchrun,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

WARMUP = 3  # the first plan guesses, the second fits
LOW = "bf16"  # what low precision is


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Compiled code, and how much room plans took."""
    torch._dynamo.reset()
    monkeypatch.setattr(plan, "_capacities", {})


def make_stepper(data, tmp_path, attention: str, precision: str, **changes) -> Stepper:
    model = TINY_BASE.as_dense() if attention == "dense" else TINY_BASE
    changes |= {"attention": attention, "precision": precision, "device": DEVICE}
    return Stepper(
        config(data, tmp_path, **changes),
        model,
        Job(0, 1, torch.device(DEVICE, 0 if DEVICE == "cuda" else None)),
    )


@triton.jit
def _twice(x_ptr, SPAN: tl.constexpr):
    at = x_ptr + tl.arange(0, SPAN)
    tl.store(at, 2 * tl.load(at))


def test_kernels_are_counted_when_they_are_compiled():
    x = torch.ones(32, device=DEVICE)
    with count_compilations() as compiled:
        for span, kernels in ((16, 1), (16, 0), (32, 1)):
            _twice[(1,)](x, SPAN=span)
            assert compiled() == {"graphs": 0, "kernels": kernels}


@pytest.mark.parametrize(
    ("attention", "recompute"), [("triton", "none"), ("triton", "layer"), ("dense", "none")]
)
def test_nothing_is_compiled_after_warm_up_over_fifty_batches(data, tmp_path, attention, recompute):
    """Neither a graph nor a kernel, though bars, documents and the tiles of the plan vary."""
    stepper = make_stepper(data, tmp_path, attention, LOW, checkpoint_activations=recompute)
    capacities, summaries, documents = set(), set(), set()
    with count_compilations() as compiled:
        for number, batch in enumerate(varied(WARMUP + 50)):
            if number == WARMUP:
                assert compiled()["graphs"] >= 2
            ready = stepper.prepare(batch)
            with torch._dynamo.config.patch(error_on_recompile=number >= WARMUP):
                stepper.accumulate(ready, last=True)
            figures, _ = stepper.update(1e-3)()
            assert figures.taken
            if number >= WARMUP:
                if attention == "triton":
                    capacities.add(ready.attention._implementation.plan.capacity)
                summaries.add(int((batch.structure.summary_doc >= 0).sum()))
                documents.add(int((batch.structure.doc.max(1).values + 1).sum()))
        assert compiled() == {"graphs": 0, "kernels": 0}
    varied_enough = (
        len(summaries) > 10 and len(documents) > 5 and (attention == "dense" or len(capacities) > 1)
    )
    assert varied_enough, "batches are not as varied as the test means"


@pytest.mark.parametrize("batches", [1, 3])
def test_batches_that_are_prepared_beside_others_are_the_same(data, tmp_path, batches):
    """Memory of a batch must not be taken for the next ones while the GPU still works with it.

    The weights stay as they are: what the order of sums changes would grow from step to step.
    """

    def found(aside):
        stepper = make_stepper(data, tmp_path, "triton", "fp32", compile=False)
        prepare = stepper.prepare if aside else stepper._prepare
        made, ahead, told = iter(varied(24)), None, []
        for number in range(1, 25):
            ready = ahead or prepare(next(made))
            stepper.accumulate(ready, last=number % batches == 0)
            del ready  # the loop's last hold on it
            ahead = prepare(next(made)) if aside and number < 24 else None
            if number % batches == 0:
                told.append(stepper.update(0.0))
            if not aside:
                torch.cuda.synchronize()
        return [(figures.loss, figures.grad_norm) for figures, _ in (tell() for tell in told)]

    expected = found(aside=False)
    assert len(set(expected)) == len(expected) and all(math.isfinite(loss) for loss, _ in expected)
    for _ in range(3):
        for got, want in zip(found(aside=True), expected, strict=True):
            assert got == pytest.approx(want, rel=1e-4)


def tensors_of(results) -> list[torch.Tensor]:
    if isinstance(results, tuple):
        return [x for part in results for x in tensors_of(part)]
    return [] if results is None else [results]


@pytest.mark.parametrize("attention", ["triton", "dense"])
def test_what_is_replayed_is_what_is_read(data, tmp_path, attention):
    """Of batches of several sizes, in turn; results of one stay what they are when the next is read."""
    stepper = make_stepper(data, tmp_path, attention, LOW, compile=False)
    batches = [batch.to(DEVICE) for batch in varied(12)]
    prepared = [stepper.prepare(batch) for batch in [*batches, *batches]]
    torch.cuda.synchronize()
    graphs = [*stepper._replayed._recorded.values()]
    assert len(graphs) == len({batch.structure.summary_doc.shape for batch in batches}) > 1 and all(graphs)
    assert all(ready.context.readers is not None for ready in prepared)
    for batch, ready in zip([*batches, *batches], prepared):
        found, exact = (
            tensors_of(x)
            for x in ((ready.context, ready.forbidden), stepper._read(batch.ids, batch.structure))
        )
        assert len(found) > 8
        for got, want in zip(found, exact, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


def test_what_cannot_be_recorded_runs_as_it_is():
    """With a warning, once; and what comes after is recorded."""
    fails = [True]

    def double(ids, structure):
        if fails[0] and torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no memory\nfor it")
        return (2 * ids, None)

    replayed = Replayed()
    first, second, *_ = (batch.to(DEVICE) for batch in varied(2))
    assert first.structure.summary_doc.shape != second.structure.summary_doc.shape
    with torch.cuda.stream(torch.cuda.Stream()):
        replayed(double, first.ids, first.structure, None)
        with pytest.warns(UserWarning, match="recording them failed: no memory$"):
            found = replayed(double, first.ids, first.structure, None)
        fails[0] = False
        found = [found, replayed(double, first.ids, first.structure, None)]
        found += [replayed(double, second.ids, second.structure, None) for _ in range(3)]
    torch.cuda.synchronize()
    assert [bool(graph) for graph in replayed._recorded.values()] == [False, True]
    for (got, nothing), batch in zip(found, (first, first, second, second, second)):
        assert nothing is None and torch.equal(got, 2 * batch.ids)


def logits_and_gradients(stepper: Stepper, batch: Batch) -> dict[str, torch.Tensor]:
    found = {"logits": stepper.logits(batch).detach().float()}
    stepper.accumulate(stepper.prepare(batch), last=True)
    return found | {name: weight.grad for name, weight in stepper.model.named_parameters()}


@pytest.mark.parametrize(
    ("attention", "recompute"),
    [("triton", "none"), ("triton", "ffn"), ("triton", "layer"), ("dense", "none"), ("dense", "layer")],
)
def test_compiled_layers_err_no_more_than_others(data, tmp_path, attention, recompute):
    """In low precision by the error rule, beside float32 that is not compiled; in float32 next to nothing."""
    batch = make_batch(0, LENGTH - 100, SUMMARIES, (0, 33, 128))

    def found(precision, compiled):
        what = recompute if compiled else "none"
        stepper = make_stepper(
            data, tmp_path, attention, precision, compile=compiled, checkpoint_activations=what
        )
        return logits_and_gradients(stepper, batch)

    exact, low, got = found("fp32", False), found(LOW, False), found(LOW, True)
    same = found("fp32", True)
    forbidden = exact["logits"].isneginf()  # instruments, by the ids alone
    for one in (exact, low, got, same):
        assert torch.equal(one["logits"].isneginf(), forbidden)
        one["logits"].masked_fill_(forbidden, 0)
    for name in exact:
        times = 2 if name == "logits" else 3
        check_error(name, got[name], low[name], exact[name], times, torch.bfloat16)
    for name in exact:
        assert (same[name] - exact[name]).abs().max() <= 1e-4 * exact[name].abs().max(), name


@pytest.mark.parametrize("attention", ["triton", "dense"])
def test_recomputing_keeps_less_memory(data, tmp_path, attention):
    kept = {}
    for recompute in ("none", "ffn", "layer"):
        stepper = make_stepper(data, tmp_path, attention, LOW, checkpoint_activations=recompute)
        batch = make_batch(0, LENGTH, SUMMARIES, (0, 33, 128))
        for _ in range(2):  # the first one holds what only compiling needs
            ready = stepper.prepare(batch)
            ready.attention.finalize()
            before = torch.cuda.memory_allocated()

            def note(part, before=before, recompute=recompute):
                if part == "forward":
                    kept[recompute] = torch.cuda.memory_allocated() - before

            stepper.accumulate(ready, True, note)
            stepper.update(1e-3)()
    assert kept["layer"] < kept["ffn"] < kept["none"], kept


def test_the_benchmark_counts_compilations_and_memory(data, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY_BASE)
    page = tmp_path / "page.md"
    words = ["--sizes", "small", "--attention", "triton,dense,flex", "--lengths", "2048", "--batch_size", "2"]
    words += ["--warmup", "2", "--steps", "4", "--data_dir", str(data), "--output", str(page)]
    train_benchmark.main(words)
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert [row["attention_used"] for row in rows] == ["triton", "dense", "flex"]
    for row in rows:
        assert row["peak_gb"] > 0 and row["compiled_in_warmup"]["graphs"] > 0
        assert row["compiled_later"] == {"graphs": 0, "kernels": 0}


def test_a_step_whose_gradient_is_not_finite_changes_nothing(data, tmp_path):
    """The optimizer is started before the host knows."""
    stepper = make_stepper(data, tmp_path, "triton", LOW, compile=False)
    batch = make_batch(0, LENGTH, SUMMARIES, (0, 33, 128))
    parameters = dict(stepper.model.named_parameters())

    def step(spoil: bool):
        stepper.accumulate(stepper.prepare(batch), last=True)
        if spoil:
            parameters["layers.1.qkv_r.weight"].grad[3, 4] = torch.inf
        figures, flags = stepper.update(1e-3, True, False)()
        assert flags == [True, False] and figures.taken != spoil
        return figures

    first = step(spoil=False)
    before = {name: weight.detach().clone() for name, weight in parameters.items()}
    step(spoil=True)
    assert all(torch.equal(weight, before[name]) for name, weight in parameters.items())
    assert {int(state["step"]) for state in stepper.optimizer.state.values()} == {1}
    assert stepper.guard.skipped == 1
    assert step(spoil=False).loss < first.loss
    assert {int(state["step"]) for state in stepper.optimizer.state.values()} == {2}


def test_an_update_does_not_wait_for_the_gpu(data, tmp_path):
    stepper = make_stepper(data, tmp_path, "triton", LOW, compile=False)
    batch = make_batch(0, LENGTH, SUMMARIES, (0, 33, 128))
    for waits in (True, False):  # the first step makes what later ones have
        stepper.accumulate(stepper.prepare(batch), last=True)
        torch.cuda.set_sync_debug_mode("default" if waits else "error")
        try:
            told = stepper.update(1e-3, True, False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        figures, flags = told()
        assert figures.taken and flags == [True, False]


def on_gpus(data, **changes) -> list[str]:
    settings = {"model_size": "base", "attention": "triton", "device": "cuda", "precision": "fp32"}
    return arguments(data, **settings, **changes)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of two batches per step on one GPU, left alone."""
    output = tmp_path_factory.mktemp("whole")
    done = run(tiny(*on_gpus(data), "--output_dir", output))
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=two_gpus)], ids=["one", "two"])
def test_a_run_that_was_told_to_stop_goes_on_where_it_was(data, tmp_path, whole, world):
    """Of two processes one is told. On two GPUs the losses are those of one with twice the batches."""
    args = [*on_gpus(data, gradient_accumulation_steps=2 // world), "--output_dir", tmp_path]
    start = tiny if world == 1 else lambda *args: torchrun(2, *args)
    stopped = run(start(*args), [fault("SIGTERM", 4, rank=world - 1)])
    assert stopped.returncode == (STOPPED if world == 1 else 1), stopped.stderr  # torchrun has but one code
    assert not json.loads((tmp_path / "summary.json").read_text())["finished"]
    resumed = run(start(*args, "--resume"))
    assert resumed.returncode == 0 and "resuming after step 5" in resumed.stdout, resumed.stderr
    one, other = records(whole), records(tmp_path)
    assert [record["tokens"] for record in other] == [record["tokens"] for record in one]
    assert [record["loss"] for record in other] == pytest.approx([record["loss"] for record in one], rel=1e-3)


@two_gpus
def test_two_gpus_make_the_gradients_of_one(data, tmp_path):
    def gradients(world, batches):
        file = tmp_path / f"{world}x{batches}.safetensors"
        args = on_gpus(data, gradient_accumulation_steps=batches, max_grad_norm=1e9, max_seq_len=1024)
        done = run(torchrun(world, "save_gradients", file, *args, script=FORKED_TRAIN))
        assert done.returncode == 0, done.stderr
        return read_gradients(file)

    (one, _), (two, exchanged) = gradients(1, 4), gradients(2, 2)
    assert exchanged and len(exchanged) == len(set(exchanged)), "each bucket once a step"
    for name, gradient in one.items():
        assert (two[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
