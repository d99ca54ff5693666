"""The configuration of a training run: flags, a YAML or JSON file, or both; flags override the file."""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import yaml

from .. import cli
from ..data import augment
from ..data.augment import Augmentation
from ..errors import UserError
from ..files import parse_json, write_atomic
from ..kernels import BACKENDS
from ..kernels.structure import KIND_RULE, KIND_RULES, NEAR_BARS
from ..model.transformer import DENSE, MAX_NEAR_BAR, MAX_NEAR_BARS, RECOMPUTE, SIZES, ModelConfig
from ..tokens import vocab
from .family_weights import DEFAULT_WEIGHTS, parse_weights

CONFIG = "config.yaml"  # in the folder of a run
PRECISIONS = ("auto", "bf16", "fp32")
_NOT_SAVED = ("resume", "dry_run")  # settings of one invocation, not of the run


@dataclass(frozen=True)
class TrainConfig:
    """The flags of `python -m meloformer.train`; its --help explains each."""

    data_dir: str
    strict_data: bool = False
    output_dir: str = "runs/train"
    model_size: str = "base"
    max_seq_len: int = 24576
    max_bars: int = 2048
    max_samples: int | None = None
    batch_size: int = 4
    gradient_accumulation_steps: int = 8
    learning_rate: float = 3e-4
    warmup_steps: int = 500
    family_weights: str = DEFAULT_WEIGHTS
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 10
    epochs: int = 100
    max_steps: int | None = None
    attention: str = "auto"
    kind_rule: str = KIND_RULE
    near_bars: str = ",".join(map(str, NEAR_BARS))
    device: str = "auto"
    precision: str = "auto"
    compile: bool | None = None
    checkpoint_activations: str = "none"
    shard_state: bool = False
    deterministic: bool = False
    seed: int = 0
    augment: bool = True
    augment_transpose: int = 6
    augment_velocity: int = 2
    augment_tempo: int = 10
    augment_band_order: bool = True
    validate_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None
    save_every_minutes: float = 30.0
    keep_last: int = 3
    init_from: str | None = None
    resume: str | None = None
    tensorboard: bool = False
    wandb: str | None = None
    dry_run: bool = False

    @property
    def fixed_num_summaries(self) -> bool:
        """Whether batches should all have room for as many summaries: FlexAttention compiles for each number,
        which takes longest of all."""
        return self.attention == "flex"

    @property
    def augmentation(self) -> Augmentation:
        """How training samples are changed."""
        if not self.augment:
            return augment.OFF
        return Augmentation(
            self.augment_transpose, self.augment_velocity, self.augment_tempo, self.augment_band_order
        )


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m meloformer.train", description="Train a model on preprocessed songs.")
    given = {field.name: field.default for field in dataclasses.fields(TrainConfig)}

    def add(name: str, help: str, **kwargs) -> None:
        parser.add_argument(f"--{name}", default=given.get(name), help=help, **kwargs)

    def switch(name: str, help: str) -> None:
        add(name, help, action=argparse.BooleanOptionalAction)

    count, every = {"type": cli.positive_int}, {"type": cli.positive_int, "metavar": "STEPS"}
    add("config", "YAML or JSON file of any of these settings; flags override it", metavar="FILE")
    parser.add_argument("--data_dir", required=True, help="folder written by meloformer.preprocess")
    switch("strict_data", "end at once if a song in --data_dir is damaged, instead of leaving it out")
    add("output_dir", "folder for checkpoints, log, samples and pictures")
    add("model_size", "preset of the model's size", choices=SIZES)
    add("max_seq_len", "tokens per row", **count)
    add("max_bars", "skip songs with more bars", **count)
    add("max_samples", "use only this many samples of each split", **count)
    add("batch_size", "rows per process and accumulation step", **count)
    add("gradient_accumulation_steps", "batches per process and optimizer step", **count)
    add("learning_rate", "peak learning rate", type=cli.number(1e-9, 10))
    add(
        "warmup_steps",
        "steps of linear warm-up, at most a tenth of the run; then cosine decay to a tenth of the peak",
        type=cli.integer(0),
    )
    add(
        "family_weights",
        "weights of the training loss by the family of the token to predict; families not named count 1, and "
        "an empty text weighs all alike",
        type=parse_weights,
        metavar="INST=2,...",
    )
    add("weight_decay", "weight decay of AdamW, on matrices only", type=cli.number(0, 10))
    add("max_grad_norm", "clip the gradient norm at this value", type=cli.number(1e-9, 1e9))
    add(
        "max_skipped_steps",
        "stop after this many consecutive steps whose loss or gradient is not finite",
        **count,
    )
    add("epochs", "passes over the data", **count)
    add("max_steps", "stop after this many optimizer steps", **count)
    add(
        "attention",
        "attention backend; auto picks one by the device; dense trains another model for comparison, a plain "
        "causal Transformer of the same size",
        choices=["auto", *BACKENDS, DENSE],
    )
    add(
        "kind_rule",
        "which tokens of other notes a note's token attends to: kinds like its own (alike, the original "
        "scheme), the kinds that usually follow it (next), or all (any)",
        choices=KIND_RULES,
    )
    add(
        "near_bars",
        "distances, in bars, at which a token sees the notes of other instruments (0 is its own bar; the "
        "original scheme has 0,1,2,4)",
        type=_distances,
        metavar="N,N",
    )
    add("device", "auto (a GPU if there is one), cpu, cuda or cuda:N")
    add("precision", "of matrix products; auto is bf16 on CUDA and fp32 elsewhere", choices=PRECISIONS)
    switch(
        "compile",
        "compile the layers with torch.compile; by default on a GPU, with any attention but reference",
    )
    add(
        "checkpoint_activations",
        "activation checkpointing: keep fewer activations of each layer and recompute them in the backward",
        choices=RECOMPUTE,
    )
    switch(
        "shard_state",
        "shard weights, gradients and optimizer state over the processes (FSDP2), for models that do not fit "
        "on each GPU; with one process it has no effect",
    )
    switch("deterministic", "bitwise reproducible on the same machine, at some cost in speed")
    add("seed", "seed of the weights and of the order of the data", type=cli.seed)
    switch(
        "augment",
        "change training samples at random, anew in each epoch, as the following flags say, or not at all",
    )
    add(
        "augment_transpose",
        "transpose by up to this many semitones, 0 for never; 6, the most, reaches every key by -5 to +6",
        type=cli.integer(0, augment.MAX_SEMITONES),
        metavar="SEMITONES",
    )
    add(
        "augment_velocity",
        f"play louder or softer by up to this many velocity bins of {128 // vocab.VELOCITY_BINS} velocities",
        type=cli.integer(0, augment.MAX_BINS),
        metavar="BINS",
    )
    add(
        "augment_tempo",
        "play faster or slower by up to this many percent",
        type=cli.integer(0, augment.MAX_PERCENT),
        metavar="PERCENT",
    )
    switch("augment_band_order", "list the instruments of a song, and write their notes, in random order")
    add("validate_every", "validate every this many steps, in addition to after each epoch", **every)
    add("sample_every", "generate a song every this many steps, as MIDI file and piano roll", **every)
    add("save_every", "save a checkpoint every this many steps, in addition to after each epoch", **every)
    add(
        "save_every_minutes",
        "save a checkpoint when this many minutes have passed since the last",
        type=cli.number(0.01, 1e6),
    )
    add("keep_last", "checkpoints to keep, in addition to the one of the lowest validation loss", **count)
    add(
        "init_from",
        "begin with the weights of this checkpoint, run or export (fine-tuning): a new run in all else, of a "
        "model of the same shape",
        metavar="CHECKPOINT",
    )
    add(
        "resume",
        "continue from the newest intact checkpoint in --output_dir (if there is one), or from the given "
        "one; more --epochs or --max_steps than before extend the run, and its learning rate then follows "
        "the schedule of the longer one",
        nargs="?",
        const="auto",
    )
    switch("tensorboard", "also log to OUTPUT_DIR/tensorboard")
    add("wandb", "also log to this Weights & Biases project", metavar="PROJECT")
    switch("dry_run", "print parameters, memory, steps and time, without training")
    return parser


def chosen_model(config: TrainConfig, preset: ModelConfig) -> ModelConfig:
    """`preset` with the attention, kind rule and near bars of `config`; without flags it keeps its own.

    Raises:
        UserError: `config` asks for a dense model and a rule.
    """
    chosen = {
        name: getattr(config, name)
        for name in ("kind_rule", "near_bars")
        if getattr(config, name) != getattr(TrainConfig, name)
    }
    if config.attention == DENSE:
        for name, value in chosen.items():
            raise UserError(f"--{name} {value}: not with --attention {DENSE}, which sees all earlier tokens")
        return preset.as_dense()
    if "near_bars" in chosen:
        chosen["near_bars"] = tuple(map(int, chosen["near_bars"].split(",")))
    return replace(preset, **chosen)


def _distances(text: str) -> str:
    """Distances in bars, ascending, as the text that the settings of a run keep."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) <= MAX_NEAR_BAR for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list like 0,1 of numbers up to {MAX_NEAR_BAR}")
    distances = sorted(set(map(int, parts)))
    if len(distances) > MAX_NEAR_BARS:
        raise argparse.ArgumentTypeError(f"more than {MAX_NEAR_BARS} distances")
    return ",".join(map(str, distances))


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """The configuration given by a command line and the file that its --config names.

    Raises:
        UserError: the file cannot be read or has an unknown key.
        SystemExit: a value is invalid; one line has been printed.
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
    """Write a YAML file that --config accepts."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_SAVED}
    write_atomic(path, yaml.safe_dump(values, sort_keys=False).encode())


def _file_arguments(path: Path, parser: cli.Parser) -> list[str]:
    """The settings in a file as command-line arguments, so that flags and files obey the same rules."""
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_json(text) if path.suffix == ".json" else yaml.safe_load(text)
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
        if value is None:  # the same as leaving it out
            continue
        if isinstance(value, (dict, list)) or (name in switches) != isinstance(value, bool):
            kind = "true or false" if name in switches else "one number or text"
            raise UserError(f"--config {path}: '{key}' must be {kind}")
        if name in switches:
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments.append(f"--{name}={value}")
    return arguments
