"""Checkpoints whose hashes are right and whose contents are wrong: a newer version's, a mistake, or malice.

Each case rewrites one file of a whole checkpoint. Commands that read that part end in one line and code 2,
and take no more memory than a checkpoint of that size is worth; the others do their work.
"""

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from meloformer import export, generate, train
from meloformer.checkpoint.run_state import RunState
from meloformer.checkpoint.store import latest_checkpoint
from meloformer.errors import DivergedError, UserError
from meloformer.model.transformer import ModelConfig

from helpers.checkpoints import edit_manifest, rewrite
from helpers.training import config

TINY = ModelConfig(layers=2, dim=16, heads=2, ffn=16)
HEADROOM = 3 << 30  # bytes of addresses, of which threads alone take one
NAN = float("nan")
Change = Callable[[dict], object]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.train(config(data, folder, max_seq_len=256, max_steps=2), TINY)
    return folder


def put(**values) -> Change:
    return lambda document: document.update(values)


def inside(name: str, **values) -> Change:
    return lambda document: document[name].update(values)


def without(*names: str) -> Change:
    return lambda document: [document.pop(name) for name in names]


def each(name: str, *values) -> dict[str, Change]:
    return {f"{name} {str(value)[:12]!r}": put(**{name: value}) for value in values}


CONFIG = {
    "unknown field": put(wings=2),
    "unknown field of a strange name": put(**{"a\nb\x1b[31m": [1] * 1000}),
    **{f"no {field.name}": without(field.name) for field in fields(ModelConfig)},
    "empty": lambda document: document.clear(),
    **each("layers", 10**9, 10**30, 300, 3, 1, 0, -1, "2", 2.0, None, True),
    **each("dim", 10**9, 10**5, 32, 17, 0, [16]),
    **each("heads", 10**9, 3, 0),
    **each("ffn", 10**9, 10**5, 17, 0),
    **each("vocab_size", 10**9, 1744, 0, -1),
    **each("near_bars", [-1], [10**12], [0.5], [[0]], "0,1", 0, [0, 0]),
    "too many near_bars": put(near_bars=list(range(5000))),
    **each("rope_theta", NAN, float("inf"), 0, "1e4", 10**400),
    "time_theta": put(time_theta=0.0),
    **each("time_fraction", 2, -0.5, NAN),
    **each("kind_rule", "most", 7, None),
    **each("features", ["smell"], "onset", [], {}),
    "dense": put(dense=True),
    "dense, in words": put(dense="no"),
    "size": put(size=5),
    "padded": lambda document: " " * (17 << 20),
}  # fmt: skip

TRAINER = {
    **{f"no {field.name}": without(field.name) for field in fields(RunState) if field.name != "identity"},
    "unknown part": put(mood="good"),
    "state of one": put(state=[0]),
    "state of text": put(state=[0, "1"]),
    "state below 0": put(state=[-1, 0]),
    "state beyond the rows": put(state=[0, 10**9]),
    "state beyond the epochs": put(state=[10**9, 0]),
    "state of huge numbers": put(state=[10**40, 10**40]),
    "tokens below 0": put(tokens=-1),
    "tokens of text": put(tokens="many"),
    "a huge number of tokens": put(tokens=10**400),
    "due: unknown": put(due=["nap"]),
    "due: twice": put(due=["sample", "sample"]),
    "due: text": put(due="sample"),
    "best: empty": put(best={}),
    "best: a text": put(best={"step": 1, "val_loss": "low"}),
    "best: to come": put(best={"step": 99, "val_loss": 1.0}),
    "guard: empty": put(guard={}),
    "guard: norms of text": inside("guard", norms=["x"]),
    "guard: no norms": inside("guard", norms=None),
    "guard: skipped below 0": inside("guard", skipped=-1),
    "guard: more skipped than taken": inside("guard", skipped=3),
    "config: a list": put(config=[]),
    "another step": put(step=3),
    "total_steps below 0": put(total_steps=-1),
    "longer than now": put(total_steps=5),
}

LENGTH = {
    "no identity": without("identity"),
    "identity: a list": put(identity=[]),
    "no max_seq_len": lambda document: document["identity"].pop("max_seq_len"),
    "max_seq_len 0": inside("identity", max_seq_len=0),
    "max_seq_len of text": inside("identity", max_seq_len="256"),
}

MANIFEST = {
    "a newer version": put(version=2),
    "an unknown version": put(version="new"),
    "step below 0": put(step=-1),
    "a loss that is no number": put(val_loss=NAN),
}

TOKENIZER = {"a newer vocabulary": put(version=10**6), "another vocabulary": put(tokens=["x"])}


def to(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def swarm(tensors: dict) -> None:
    tensors.update({f"t{i}": torch.empty(0) for i in range(100_000)})


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([0]), value)


TABLE, NORM = "token_embedding.weight", "norm_out.weight"
WEIGHTS = {
    "no tensor": lambda tensors: tensors.clear(),
    "a tensor less": without(NORM),
    "a tensor more": put(wings=torch.zeros(3)),
    "a tensor of a strange name": put(**{"a\nb" * 1000: torch.zeros(3)}),
    "100,000 empty tensors": swarm,
    "transposed": to(TABLE, lambda tensor: tensor.T.contiguous()),
    "one row less": to(TABLE, lambda tensor: tensor[1:]),
    "a dimension more": to(NORM, lambda tensor: tensor[None]),
    "a scalar": to(NORM, lambda tensor: torch.tensor(1.0)),
    **{f"{dtype}": to(NORM, lambda tensor, dtype=dtype: tensor.to(dtype))
       for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)},
    "nan": to(TABLE, filled(NAN)),
    "infinite": to(NORM, filled(-float("inf"))),
}  # fmt: skip

FIRST, SECOND, STEP = "state.0.exp_avg", "state.0.exp_avg_sq", "state.0.step"
OPTIMIZER = {
    "no tensor": lambda tensors: tensors.clear(),
    "a moment less": without(SECOND),
    "a parameter less": without(FIRST, SECOND, STEP),
    "a moment more": put(**{"state.0.max_exp_avg_sq": torch.zeros(3)}),
    "a name without a number": put(**{"state.x.step": torch.zeros(())}),
    "another shape": to(FIRST, lambda tensor: tensor[1:]),
    "another dtype": to(FIRST, lambda tensor: tensor.double()),
    "nan": to(FIRST, filled(NAN)),
    "second moment below 0": to(SECOND, filled(-1.0)),
    "step below 0": to(STEP, lambda tensor: tensor - 9),
    "step 0": to(STEP, lambda tensor: tensor * 0),
    "step of a longer run": to(STEP, lambda tensor: tensor + 9),
    "half a step": to(STEP, lambda tensor: tensor - 0.5),
    "step of a shape": to(STEP, lambda tensor: tensor[None]),
}

GROUPS = {
    "no groups": without("param_groups"),
    "no values": without("values"),
    "values": put(values={"0": {"step": "one"}}),
    "a group less": lambda header: header["param_groups"].pop(),
    "groups of numbers": put(param_groups=[1, 2]),
    "a parameter twice": lambda header: header["param_groups"][0]["params"].append(0),
    "a setting less": lambda header: header["param_groups"][0].pop("eps"),
    "a setting more": lambda header: header["param_groups"][0].update(wings=2),
    "lr of text": lambda header: header["param_groups"][0].update(lr="high"),
    "eps that is no number": lambda header: header["param_groups"][0].update(eps=NAN),
    "weight decay of 400 digits": lambda header: header["param_groups"][0].update(weight_decay=10**400),
    "betas out of range": lambda header: header["param_groups"][0].update(betas=[2.0, 2.0]),
    "one beta": lambda header: header["param_groups"][0].update(betas=[0.9]),
    "no betas": lambda header: header["param_groups"][0].update(betas=None),
    "a header too long": put(note="x" * (17 << 20)),
    "amsgrad of text": lambda header: header["param_groups"][0].update(amsgrad="yes"),
}  # fmt: skip


def change_json(path, name: str, change: Change) -> None:
    document = json.loads((path / name).read_text())
    text = change(document)
    rewrite(path, name, (json.dumps(document) + (text if isinstance(text, str) else "")).encode())


def change_tensors(path, name: str, change: Change, of_header: bool = False) -> None:
    tensors = load_file(path / name)
    with safe_open(path / name, "pt") as opened:
        header = {key: json.loads(text) for key, text in (opened.metadata() or {}).items()}
    change(header if of_header else tensors)
    content = save(tensors, {key: json.dumps(value) for key, value in header.items()} or None)
    rewrite(path, name, content)


def change_manifest(path, name: str, change: Change) -> None:
    edit_manifest(path, change)


ALL, TRAIN = ("generate", "export", "train"), ("train",)
KINDS = {
    "config.json": (change_json, CONFIG, ALL),
    "trainer.json": (change_json, TRAINER, TRAIN),
    "trainer.json ": (change_json, LENGTH, ALL),
    "tokenizer.json": (change_json, TOKENIZER, ALL),
    "manifest.json": (change_manifest, MANIFEST, ALL),
    "model.safetensors": (change_tensors, WEIGHTS, ALL),
    "optimizer.safetensors": (change_tensors, OPTIMIZER, TRAIN),
    "optimizer.safetensors ": (lambda *args: change_tensors(*args, of_header=True), GROUPS, TRAIN),
}
CASES = [
    pytest.param(kind, name, marks=pytest.mark.faults if cases[name] is swarm else ())  # seconds
    for kind, (_, cases, _) in KINDS.items()
    for name in cases
]


@pytest.fixture
def bounded():
    """Too much memory for what a tiny checkpoint needs ends in an error of another kind."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + HEADROOM, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def call(command: str, path, data, folder) -> None:
    if command == "generate":
        generate.main(f"--checkpoint {path} --output {folder}/song.mid --max_tokens 1 --device cpu".split())
    elif command == "export":
        export.main(["--checkpoint", str(path), "--output", str(folder / "model")])
    else:
        settings = config(data, folder / "run", max_seq_len=256, max_steps=2, resume=str(path))
        train.train(settings, TINY)


@pytest.mark.parametrize("kind, name", CASES, ids=lambda text: text.strip())
def test_wrong_contents_end_in_one_line(run, data, tmp_path, bounded, kind, name):
    change, cases, refusing = KINDS[kind]
    path = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints" / path.name, path)
    change(path, kind.strip(), cases[name])
    for command in refusing:
        with pytest.raises(UserError) as error:
            call(command, path, data, tmp_path)
        text = str(error.value)
        assert error.value.exit_code == 2 and not isinstance(error.value, DivergedError)
        assert text.isprintable() and len(text) < 700 and str(path) in text and "memory" not in text, text
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "run"] == [path.name]


def test_there_are_enough_cases_and_a_whole_checkpoint_passes(run, data, tmp_path, bounded):
    assert len(CASES) >= 100
    path = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints" / path.name, path)
    for command in ("export", "train"):
        call(command, path, data, tmp_path)
    assert (tmp_path / "model").is_dir() and (tmp_path / "run" / "summary.json").is_file()


def test_what_a_run_lacks_does_not_keep_its_model_from_use(run, data, tmp_path):
    path = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints" / path.name, path)
    change_json(path, "trainer.json", TRAINER["no guard"])
    change_tensors(path, "optimizer.safetensors", OPTIMIZER["nan"])
    call("export", path, data, tmp_path)
    assert (tmp_path / "model").is_dir()


def test_a_newer_version_is_named(run, data, tmp_path):
    path = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints" / path.name, path)
    edit_manifest(path, MANIFEST["a newer version"])
    with pytest.raises(UserError, match=r"written by a newer MeloFormer, in version 2 .* reads version 1"):
        call("generate", path, data, tmp_path)


def test_a_newer_version_is_not_passed_over(run):
    """A run that went on from an earlier checkpoint would delete it."""
    root = run / "checkpoints"
    newer = root / "step-00000003"
    shutil.copytree(root / "step-00000002", newer)
    try:
        edit_manifest(newer, MANIFEST["a newer version"])
        with pytest.raises(UserError, match=f"{newer}.*written by a newer MeloFormer"):
            latest_checkpoint(root)
    finally:
        shutil.rmtree(newer)
