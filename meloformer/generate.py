"""`python -m meloformer.generate`: a new song, or the continuation of one, from a checkpoint."""

import argparse
import re
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from . import cli
from .errors import MidiError, UserError
from .generation.constraints import Constraints
from .generation.load import load_model
from .generation.loop import DEFAULT_MAX_TOKENS, generate
from .generation.outputs import require_outputs
from .generation.report import NewMusic, Progress, hints
from .generation.sampling import Sampling
from .kernels import BACKENDS
from .midi.general_midi import PROGRAM_NAMES
from .midi.writer import write_midi
from .model.device import pick_attention, pick_device
from .model.transformer import DENSE
from .stop import STOPPED, StopRequest
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


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m meloformer.generate",
        description="Generate a song, or continue one, with a trained model.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, or the output folder of a training run")
    add("--output", required=True, help="the MIDI file to write")
    add("--picture", help="also draw the song as a piano roll, into this .png file")
    add(
        "--overwrite",
        action="store_true",
        help="replace the files of --output and --picture if they exist; the prompt is never replaced",
    )
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


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if the song is finished, `STOPPED` if it was stopped on request."""
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
    outputs = {"--output": args.output} | ({"--picture": args.picture} if args.picture else {})
    with StopRequest("will keep the complete bars and stop; Ctrl-C stops without keeping them") as request:
        require_outputs(outputs, args.prompt, args.overwrite)
        return write_song(args, constraints, request)


def write_song(args: argparse.Namespace, constraints: Constraints, request: StopRequest) -> int:
    """Generate a song and write it; returns the exit code.

    Raises:
        UserError: of the prompt, the checkpoint, or a file that cannot be written.
    """
    prompt = None if args.prompt is None else read_prompt(args.prompt, args.prompt_bars)
    if prompt is not None and constraints.instruments is not None:
        prompt = attributes.with_instruments(prompt, constraints.instruments)
    model, max_context = load_model(Path(args.checkpoint), pick_device(args.device))
    attention = pick_attention(args.attention, model.device, model.config)
    progress = Progress(args.bars, args.max_tokens, request)
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
        on_token=progress.on_token,
        stop=progress.stop,
    )
    music = NewMusic.of(ids, begin=0 if prompt is None else len(prompt))
    progress.close(music.bars)
    if not music.bars or not vocab.P.mask(ids).any():
        nothing = f"so {args.output} is not written"
        if progress.stopped_by:
            print(f"stopped by {progress.stopped_by} before a bar with notes was complete, {nothing}")
            return STOPPED
        raise UserError(
            f"the model wrote no note in {progress.tokens} tokens, {nothing}: raise --max_tokens, or try "
            "another --seed or --temperature"
        )
    midi = HIDTokenizer().decode(ids)
    try:
        write_midi(midi, args.output)
    except OSError as error:
        raise UserError(
            f"cannot write {args.output}: {error.strerror or error}. The song is lost, but the same --seed "
            "writes it again"
        ) from None
    print("\n".join([f"{args.output}: {music}", *hints(music, progress, max_context)]))
    if args.picture:
        from .plots.piano_roll import piano_roll  # matplotlib is slow to import, and only needed here

        piano_roll(midi, args.picture)
    return STOPPED if progress.stopped_by else 0


if __name__ == "__main__":
    cli.run(main)
