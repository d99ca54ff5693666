"""`python -m meloformer.generate`: a new song, or the continuation of one, from a checkpoint."""

import os
import re
import stat
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import cli
from .errors import MidiError, UserError
from .files import temporary_of
from .generation.constraints import Constraints
from .generation.load import load_model
from .generation.loop import DEFAULT_MAX_TOKENS, generate
from .generation.sampling import Sampling
from .kernels import BACKENDS
from .midi.general_midi import PROGRAM_NAMES
from .midi.writer import write_midi
from .model.device import pick_attention, pick_device
from .model.transformer import DENSE
from .tokens import attributes, vocab
from .tokens.tokenizer import HIDTokenizer


def parse_instruments(text: str) -> tuple[int, ...]:
    """'drums, 33, flute' -> instrument numbers: General MIDI programs 0..127 by number or name."""
    names = {name.lower(): i for i, name in enumerate(PROGRAM_NAMES)} | {"drums": vocab.DRUMS}
    found = []
    for word in (word.strip().lower() for word in text.split(",")):
        if word in names:
            found.append(names[word])
        elif word.isdecimal() and int(word) < 128:
            found.append(int(word))
        else:
            close = [name for name in names if word and word in name] or get_close_matches(word, names)
            hint = f"; did you mean {', '.join(close[:5])}?" if close else ""
            raise UserError(
                f"--instruments: '{word}' is no program number (0..127), General MIDI name or 'drums'{hint}"
            )
    return tuple(sorted(set(found)))


def parse_signature(text: str) -> int:
    """'6/8' -> index into `vocab.SIGNATURES`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    signature = (int(match[1]), int(match[2])) if match else None
    if signature not in vocab.SIGNATURE_INDEX:
        raise UserError(
            f"--time_signature: '{text}' is not of the form N/D with N in 1..24 and D in 1, 2, 4, 8, 16, 32"
        )
    return vocab.SIGNATURE_INDEX[signature]


def read_prompt(path: str, bars: int | None) -> np.ndarray:
    """Token ids (uint16 [n]) of a MIDI file, or of its first `bars` bars, without EOS.

    Raises:
        UserError: the file cannot become a song; the message names it.
    """
    try:
        ids = HIDTokenizer().encode(path)[:-1]
    except MidiError as error:
        raise UserError(f"--prompt {path}: {error}") from None
    bar_starts = attributes.cut_points(ids)
    if bars is not None and bars < len(bar_starts):
        ids = ids[: bar_starts[bars]]
    return ids


def require_writable(flag: str, path: str) -> None:
    """Check that a file can be written at `path` before the work begins, and leave nothing there.

    Raises:
        UserError: it cannot; the message names flag and path.
    """
    target = Path(path)
    try:
        if "\0" in path:
            raise ValueError("embedded null byte")
        if target.is_dir():
            raise UserError(f"{flag} {path}: is a folder, not the name of a file")
        if not target.parent.is_dir():
            raise UserError(f"{flag} {path}: there is no folder {target.parent}")
        # Writing replaces what is there: of a device or a pipe, that would be the device itself.
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            raise UserError(f"{flag} {path}: exists and is not a regular file")
        # Files are written under a longer name beside the target and then renamed: try one like it.
        probe = temporary_of(target)
        was_there = probe.exists()
        probe.touch()
        if not was_there:
            probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {path!r}: cannot be written ({reason})") from None


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m meloformer.generate",
        description="Generate a song, or continue one, with a trained model.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, or the output folder of a training run")
    add("--output", required=True, help="the MIDI file to write")
    add("--picture", help="also draw the song as a piano roll, into this .png file")
    add("--prompt", help="a MIDI file to continue")
    add("--prompt_bars", type=cli.positive_int, help="use only the first N bars of the prompt", metavar="N")
    add(
        "--bars",
        type=cli.positive_int,
        help="number of new bars; without it the model decides where to end",
    )
    add(
        "--max_tokens", type=cli.positive_int, default=DEFAULT_MAX_TOKENS, help="maximum number of new tokens"
    )
    add(
        "--temperature",
        type=cli.number(0, 100),
        default=1.0,
        help="divides the logits: above 1 more varied, below 1 more predictable, 0 greedy",
    )
    add("--top_k", type=cli.positive_int, help="sample from the K most likely tokens only", metavar="K")
    add(
        "--top_p",
        type=cli.number(1e-6, 1),
        default=1.0,
        help="sample from the most likely tokens whose probabilities sum to P",
        metavar="P",
    )
    add(
        "--tempo",
        type=cli.integer(vocab.MIN_BPM, vocab.MAX_BPM),
        help=f"tempo of the new bars in quarter notes per minute, {vocab.MIN_BPM}..{vocab.MAX_BPM}",
    )
    add("--time_signature", help="time signature of the new bars, e.g. 3/4")
    add(
        "--instruments",
        help="the only instruments of the new bars: program numbers, General MIDI names or drums, separated "
        "by commas",
    )
    add(
        "--seed",
        type=cli.seed,
        default=0,
        help="random seed: the same one gives the same song on the same machine",
    )
    add(
        "--attention",
        default="auto",
        choices=["auto", *BACKENDS, DENSE],
        help="attention backend; auto picks the fastest that runs here",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto is CUDA where there is a GPU")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.prompt_bars and not args.prompt:
        raise UserError("--prompt_bars needs --prompt")
    if args.picture and not args.picture.lower().endswith(".png"):
        raise UserError(f"--picture {args.picture}: must end in .png")
    constraints = Constraints(
        signature=None if args.time_signature is None else parse_signature(args.time_signature),
        bpm=args.tempo,
        instruments=None if args.instruments is None else parse_instruments(args.instruments),
    )
    require_writable("--output", args.output)
    if args.picture:
        require_writable("--picture", args.picture)
        if os.path.realpath(args.picture) == os.path.realpath(args.output):
            raise UserError(f"--picture {args.picture}: is the same file as --output")
    prompt = None if args.prompt is None else read_prompt(args.prompt, args.prompt_bars)
    if prompt is not None and constraints.instruments is not None:
        prompt = attributes.with_instruments(prompt, constraints.instruments)
    model, max_context = load_model(Path(args.checkpoint), pick_device(args.device))
    attention = pick_attention(args.attention, model.device, model.config)

    bar = tqdm(total=args.bars or args.max_tokens, unit="bar" if args.bars else "token")

    def show(tokens: int, bars: int) -> None:
        bar.set_postfix(tokens=tokens, bars=bars, refresh=False)
        bar.update((max(0, bars - 1) if args.bars else tokens) - bar.n)

    ids = generate(
        model,
        prompt,
        bars=args.bars,
        max_tokens=args.max_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p),
        constraints=constraints,
        seed=args.seed,
        max_context=max_context,
        attention=attention,
        on_token=show,
    )
    bar.close()
    new = ids[0 if prompt is None else len(prompt) :]
    if not vocab.P.mask(ids).any():
        raise UserError(f"the model wrote no note in {args.max_tokens} tokens: raise --max_tokens")
    midi = HIDTokenizer().decode(ids)
    try:
        write_midi(midi, args.output)
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror}") from None
    new_bars = len(attributes.cut_points(ids)) - (0 if prompt is None else len(attributes.cut_points(prompt)))
    print(f"{args.output}: {new_bars} new bars, {int(vocab.P.mask(new).sum())} new notes")
    if args.bars and new_bars < args.bars:
        print(
            f"fewer than {args.bars} bars: stopped at --max_tokens {args.max_tokens}, or because one bar "
            f"alone is longer than the {max_context} tokens of the rows that the model was trained on"
        )
    if args.picture:
        from .plots.piano_roll import piano_roll  # matplotlib is slow to import, and only needed here

        piano_roll(midi, args.picture)


if __name__ == "__main__":
    cli.run(main)
