"""The configuration of a training run: flags, or a YAML or JSON file, or both, the flags before the file."""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import yaml

from .. import cli
from ..errors import UserError
from ..files import write_atomic
from ..kernels import BACKENDS
from ..kernels.structure import KIND_RULE, KIND_RULES
from ..model.transformer import DENSE, RECOMPUTE, SIZES, ModelConfig

CONFIG = "config.yaml"  # in the folder of a run
PRECISIONS = ("auto", "bf16", "fp32")
_NOT_SAVED = ("resume", "dry_run")  # of one start of a run, not of the run


@dataclass(frozen=True)
class TrainConfig:
    """What `python -m meloformer.train` takes; see its --help."""

    data_dir: str
    output_dir: str = "runs/train"
    model_size: str = "base"
    max_seq_len: int = 24576
    max_bars: int = 2048
    max_samples: int | None = None
    batch_size: int = 4
    gradient_accumulation_steps: int = 8
    learning_rate: float = 3e-4
    warmup_steps: int = 500
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 10
    epochs: int = 100
    max_steps: int | None = None
    attention: str = "auto"
    kind_rule: str = KIND_RULE
    device: str = "auto"
    precision: str = "auto"
    compile: bool | None = None
    checkpoint_activations: str = "none"
    shard_state: bool = False
    deterministic: bool = False
    seed: int = 0
    validate_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None
    save_every_minutes: float = 30.0
    keep_last: int = 3
    resume: str | None = None
    tensorboard: bool = False
    wandb: str | None = None
    dry_run: bool = False

    @property
    def fixed_num_summaries(self) -> bool:
        """Whether batches should all have room for as many summaries: FlexAttention compiles for each number,
        which takes longest of all."""
        return self.attention == "flex"


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m meloformer.train", description="Train a model on preprocessed songs.")
    given = {field.name: field.default for field in dataclasses.fields(TrainConfig)}

    def add(name: str, help: str, **kwargs) -> None:
        parser.add_argument(f"--{name}", default=given.get(name), help=help, **kwargs)

    def switch(name: str, help: str) -> None:
        add(name, help, action=argparse.BooleanOptionalAction)

    count, every = {"type": cli.positive_int}, {"type": cli.positive_int, "metavar": "STEPS"}
    add("config", "YAML or JSON file of any of these settings; flags go before it", metavar="FILE")
    parser.add_argument("--data_dir", required=True, help="folder that meloformer.preprocess wrote")
    add("output_dir", "checkpoints, log, samples and pictures go here")
    add("model_size", "size of the model", choices=SIZES)
    add("max_seq_len", "tokens per row", **count)
    add("max_bars", "skip songs with more bars", **count)
    add("max_samples", "use only so many samples of each split", **count)
    add("batch_size", "rows per process", **count)
    add("gradient_accumulation_steps", "batches per optimizer step", **count)
    add("learning_rate", "peak of the schedule", type=cli.number(1e-9, 10))
    add(
        "warmup_steps",
        "steps of linear warm-up, at most a tenth of the run; a cosine follows",
        type=cli.integer(0),
    )
    add("weight_decay", "of AdamW, on matrices only", type=cli.number(0, 10))
    add("max_grad_norm", "clip gradients here", type=cli.number(1e-9, 1e9))
    add("max_skipped_steps", "stop after so many steps in a row whose numbers are not finite", **count)
    add("epochs", "passes over the data", **count)
    add("max_steps", "stop after so many optimizer steps", **count)
    add(
        "attention",
        "attention backend, auto takes the best for the device; dense trains another model, a plain causal "
        "Transformer of the same size, to compare with",
        choices=["auto", *BACKENDS, DENSE],
    )
    add(
        "kind_rule",
        "what a note's token sees of other notes: its like (alike, the original scheme), the kinds that "
        "usually follow it (next), or any",
        choices=KIND_RULES,
    )
    add("device", "auto, cpu, cuda or cuda:N")
    add("precision", "auto is bf16 on CUDA and fp32 elsewhere", choices=PRECISIONS)
    switch("compile", "compile the layers; by default on a GPU, with any attention but reference")
    add(
        "checkpoint_activations",
        "save memory: keep less for the backward of each layer, and compute it again",
        choices=RECOMPUTE,
    )
    switch(
        "shard_state",
        "split weights, gradients and optimizer state among the processes (FSDP2), where they do not fit on "
        "each GPU; with one process nothing changes, so that a run's configuration serves any number of them",
    )
    switch("deterministic", "the same bits in every run on the same machine, at some cost in speed")
    add("seed", "of the weights and the order of the data", type=cli.seed)
    add("validate_every", "validate every so many steps besides after each epoch", **every)
    add("sample_every", "let the model write a song every so many steps, as MIDI and picture", **every)
    add("save_every", "save every so many steps besides after each epoch", **every)
    add(
        "save_every_minutes",
        "and when so much time has passed since the last save",
        type=cli.number(0.01, 1e6),
    )
    add("keep_last", "checkpoints to keep, besides the one of the lowest validation loss", **count)
    add(
        "resume",
        "go on from the newest whole checkpoint in --output_dir (if there is one), or from the given one",
        nargs="?",
        const="auto",
    )
    switch("tensorboard", "log to --output_dir/tensorboard too")
    add("wandb", "log to this project of Weights & Biases too", metavar="PROJECT")
    switch("dry_run", "print parameters, memory, steps and time, and train nothing")
    return parser


def chosen_model(config: TrainConfig, preset: ModelConfig) -> ModelConfig:
    """`preset` with the attention that a run asks for, see `ModelConfig`; its own kind rule if none is.

    Raises:
        UserError: it asks for a dense model and a kind rule.
    """
    if config.attention != DENSE:
        return preset if config.kind_rule == KIND_RULE else replace(preset, kind_rule=config.kind_rule)
    if config.kind_rule != KIND_RULE:
        raise UserError(f"--kind_rule {config.kind_rule}: not with --attention {DENSE}, which sees all kinds")
    return preset.as_dense()


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """The configuration that a command line gives, with the file that its --config names.

    Raises:
        UserError: the file cannot be read or has a key that is no setting.
        SystemExit: a value is wrong; one line has been printed.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    first = cli.Parser(prog=parser.prog, add_help=False)
    first.add_argument("--config")
    file = first.parse_known_args(argv)[0].config
    in_file = [] if file is None else _file_arguments(Path(file), parser)
    values = vars(parser.parse_args([*in_file, *argv]))
    del values["config"]
    return TrainConfig(**values)


def save_config(config: TrainConfig, path: Path) -> None:
    """Write a file that --config takes back."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_SAVED}
    write_atomic(path, yaml.safe_dump(values, sort_keys=False).encode())


def _file_arguments(path: Path, parser: cli.Parser) -> list[str]:
    """The settings in a file as arguments, so that it is held to the same rules as flags are."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: neither YAML nor JSON ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold settings of the form 'name: value'")
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    switches = {field.name for field in dataclasses.fields(TrainConfig) if field.type in (bool, bool | None)}
    arguments = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UserError(f"--config {path}: there is no setting '{key}'{hint}")
        if value is None:  # as if it were not there
            continue
        if isinstance(value, (dict, list)) or (name in switches) != isinstance(value, bool):
            kind = "true or false" if name in switches else "one number or text"
            raise UserError(f"--config {path}: '{key}' must be {kind}")
        if name in switches:
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments.append(f"--{name}={value}")
    return arguments
