"""`python -m meloformer.demo`: every step from MIDI files to a new song, in a few minutes.

Each step runs the command that a user would type, and prints it.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from miditoolkit.midi.utils import example_midi_file
from tqdm import trange

from . import cli, generate, preprocess, train
from .composer.compose import compose
from .errors import UserError
from .files import write_atomic
from .midi.writer import write_midi
from .plots.loss_curve import loss_curve
from .training.run_log import LOG, read_log

SONGS = 36
STEPS = 60
BARS = 8


def step(title: str, command: Callable[[list[str]], int | None], args: dict[str, object]) -> None:
    """Print and run `python -m <module of the command>` with `--key value` arguments; None: a flag alone."""
    words = []
    for key, value in args.items():
        words += [f"--{key}"] if value is None else [f"--{key}", str(value)]
    print(f"\n{title}\n$ {shlex.join(['python', '-m', command.__module__, *words])}")
    if code := command(words):
        sys.exit(code)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(
        prog="python -m meloformer.demo",
        description="Compose songs, preprocess them, train a small model and generate a song with it.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for all results")
    parser.add_argument("--steps", type=cli.positive_int, default=STEPS, help="optimizer steps to train")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the results of an earlier demo there"
    )
    args = parser.parse_args(argv)
    try:
        demo(args.output, args.steps, args.overwrite)
    except OSError as error:
        raise UserError(f"{error.filename or args.output}: {error.strerror or error}") from error


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Create `folder`, or delete the results of an earlier demo in it; it is marked as the folder of a demo.

    Raises:
        UserError: it is a file, has other content, or has results and `overwrite` is not set.
    """
    mark = folder / ".meloformer-demo"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --output")
    if folder.exists() and any(folder.iterdir()):
        if not mark.exists():
            raise UserError(f"{folder} is not empty and not the folder of a demo; choose another --output")
        if not overwrite:
            raise UserError(f"{folder} holds a demo already: choose another --output, or add --overwrite")
        for name in ("midi", "data", "run"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("new-song.mid", "new-song.png", "loss.png"):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


def demo(folder: Path, steps: int, overwrite: bool) -> None:
    """Run all steps, with all results in `folder`."""
    prepare_folder(folder, overwrite)
    started = time.perf_counter()

    print(f"A real song, and {SONGS} songs by a small procedural composer")
    midi = folder / "midi"
    midi.mkdir()
    write_atomic(midi / "real-song.mid", Path(example_midi_file()).read_bytes())
    for seed in trange(SONGS, desc="compose", unit="song"):
        write_midi(compose(seed), midi / f"composed-{seed:02d}.mid")

    step("1. MIDI files to token shards", preprocess.main, {"input": midi, "output": folder / "data"})
    run = folder / "run"
    step(
        "2. Train",
        train.main,
        {
            "data_dir": folder / "data",
            "output_dir": run,
            "model_size": "small",
            "max_seq_len": 2048,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "max_steps": steps,
            "no_augment": None,  # too few steps to meet a song in other keys
        },
    )
    loss_curve(read_log(run / LOG), folder / "loss.png")
    step(
        "3. Generate",
        generate.main,
        {
            "checkpoint": run,
            "output": folder / "new-song.mid",
            "picture": folder / "new-song.png",
            "bars": BARS,
            "max_tokens": 800,
            "time_signature": "4/4",
            "tempo": 116,
            "instruments": "drums, fingered bass, grand piano, strings 1, flute",
            "top_p": 0.9,
        },
    )
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Look at:")
    for path, what in {
        folder / "new-song.mid": "the song",
        folder / "new-song.png": "its piano roll",
        folder / "loss.png": "the loss curve",
        run / "checkpoints": "the checkpoint",
    }.items():
        print(f"  {path!s:32} {what}")
    print(f"{steps} steps teach a model little: train longer, and on your own MIDI files.")


if __name__ == "__main__":
    cli.run(main)
