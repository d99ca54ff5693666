"""`python -m meloformer.demo`: the whole way from MIDI files to a new song, in a few minutes.

Every step is the command a user would type, and is printed as such.
"""

import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from miditoolkit.midi.utils import example_midi_file
from tqdm import trange

from . import cli, generate, preprocess, train
from .compose import compose
from .errors import UserError
from .plot import loss_curve

SONGS = 36
STEPS = 90
BARS = 8


def step(title: str, command: Callable[[list[str]], None], args: dict[str, object]) -> None:
    """Say and run `python -m <the command's module>` with `--key value` arguments."""
    words = [word for key, value in args.items() for word in (f"--{key}", str(value))]
    print(f"\n{title}\n$ {shlex.join(['python', '-m', command.__module__, *words])}")
    command(words)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(
        prog="python -m meloformer.demo",
        description="Compose songs, preprocess them, train a small model and let it write a song.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for all of it")
    parser.add_argument("--steps", type=cli.positive_int, default=STEPS, help="optimizer steps to train")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier demo left there")
    args = parser.parse_args(argv)
    folder: Path = args.output
    if folder.exists() and any(folder.iterdir()):
        if not args.overwrite:
            raise UserError(f"{folder} is not empty: choose another --output, or add --overwrite")
        if not (folder / "midi").is_dir():
            raise UserError(f"{folder} is not the folder of a demo; it is left alone")
        shutil.rmtree(folder)
    started = time.perf_counter()

    print(f"A real song, and {SONGS} songs by a small procedural composer")
    midi = folder / "midi"
    midi.mkdir(parents=True)
    shutil.copy(example_midi_file(), midi / "real-song.mid")
    for seed in trange(SONGS, desc="compose", unit="song"):
        compose(seed).dump(midi / f"composed-{seed:02d}.mid")

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
            "max_steps": args.steps,
        },
    )
    loss_curve(run / "log.jsonl", folder / "loss.png")
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
    print(f"{args.steps} steps teach habits, not music: train longer, on your own MIDI files.")


if __name__ == "__main__":
    cli.run(main)
