"""`python -m meloformer.generate`: a new song, or the continuation of one, from a checkpoint."""

import re
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import cli
from .errors import UserError
from .generation.sampling import DEFAULT_MAX_TOKENS, Sampling, Wishes, generate, load_model
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
    """Token ids of a MIDI file, or of its first bars, without EOS."""
    ids = HIDTokenizer().encode(path)[:-1]
    lines = attributes.cut_points(ids)
    if bars is not None and bars < len(lines):
        ids = ids[: lines[bars]]
    return ids


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m meloformer.generate", description="Write a song with a trained model."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, or the output folder of a training run")
    add("--output", required=True, help="the .mid file to write")
    add("--picture", help="also draw a piano roll into this .png file")
    add("--prompt", help="a MIDI file to continue")
    add("--prompt_bars", type=cli.positive_int, help="take only so many bars of it")
    add("--bars", type=cli.positive_int, help="new bars to write; by default the model decides where to end")
    add("--max_tokens", type=cli.positive_int, default=DEFAULT_MAX_TOKENS, help="new tokens at most")
    add(
        "--temperature",
        type=cli.number(0, 100),
        default=1.0,
        help="above 1 wilder, below 1 tamer, 0 always the likeliest",
    )
    add("--top_k", type=cli.positive_int, help="draw from the k likeliest tokens")
    add(
        "--top_p",
        type=cli.number(1e-6, 1),
        default=1.0,
        help="draw from the likeliest tokens of this total probability",
    )
    add(
        "--tempo",
        type=cli.integer(vocab.MIN_BPM, vocab.MAX_BPM),
        help=f"tempo of the new bars, {vocab.MIN_BPM}..{vocab.MAX_BPM} BPM",
    )
    add("--time_signature", help="time signature of the new bars, e.g. 3/4")
    add("--instruments", help="only these may play in the new bars: numbers, General MIDI names, drums")
    add("--seed", type=cli.seed, default=0, help="another seed, another song")
    add("--attention", default="auto", choices=["auto", *BACKENDS, DENSE], help="attention backend")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.prompt_bars and not args.prompt:
        raise UserError("--prompt_bars goes with --prompt")
    if args.picture and not args.picture.lower().endswith(".png"):
        raise UserError(f"--picture {args.picture}: must end in .png")
    wishes = Wishes(
        signature=None if args.time_signature is None else parse_signature(args.time_signature),
        bpm=args.tempo,
        instruments=None if args.instruments is None else parse_instruments(args.instruments),
    )
    for path in filter(None, (args.output, args.picture)):
        if not Path(path).parent.is_dir():
            raise UserError(f"{path}: there is no folder {Path(path).parent}")
    prompt = None if args.prompt is None else read_prompt(args.prompt, args.prompt_bars)
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
        wishes=wishes,
        seed=args.seed,
        max_context=max_context,
        attention=attention,
        on_token=show,
    )
    bar.close()
    new = ids[0 if prompt is None else len(prompt) :]
    if not vocab.P.mask(ids).any():
        raise UserError(f"the model wrote no note in {args.max_tokens} tokens: try more --max_tokens")
    midi = HIDTokenizer().decode(ids)
    try:
        write_midi(midi, args.output)
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror}") from None
    new_bars = len(attributes.cut_points(ids)) - (0 if prompt is None else len(attributes.cut_points(prompt)))
    print(f"{args.output}: {new_bars} new bars, {int(vocab.P.mask(new).sum())} new notes")
    if args.bars and new_bars < args.bars:
        print(
            f"stopped before {args.bars} bars were full: at --max_tokens {args.max_tokens}, or because one "
            f"bar grew beyond the {max_context} tokens that the model was trained to see"
        )
    if args.picture:
        from .plots.piano_roll import piano_roll  # matplotlib is slow to import, and only needed here

        piano_roll(midi, args.picture)


if __name__ == "__main__":
    cli.run(main)
