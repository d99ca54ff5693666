"""`python -m meloformer.generate`: a new song, or the continuation of one, from a checkpoint."""

import argparse
import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import miditoolkit
import numpy as np

from . import cli, idle_threads  # noqa: F401 -- before what imports torch
from .errors import MidiError, UserError
from .generation.arguments import add_wishes, read_constraints, read_sampling
from .generation.as_json import BarStream, write_tokens
from .generation.constraints import Constraints
from .generation.device.loop import (
    CACHE_DTYPES,
    cannot_write,
    pick_cache_dtype,
    uses_graphs,
    write_on_device,
)
from .generation.draft import DEFAULT_MAX_TOKENS, Draft, OutlinedDraft
from .generation.given import Given, add_given, read_given
from .generation.load import load_model
from .generation.loop import write
from .generation.outputs import require_outputs
from .generation.report import NewMusic, Progress, hints, hints_of_given, progress_bar
from .generation.rows import require_int8
from .generation.sound import Synthesizer
from .kernels import BACKENDS
from .midi.general_midi import instrument_name
from .midi.writer import write_midi
from .model.device import pick_attention, pick_device
from .model.transformer import DENSE
from .stop import STOPPED, StopRequest
from .tokens import attributes, vocab
from .tokens.tokenizer import HIDTokenizer


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
        "--wav",
        help="also write the song as audio, into this .wav file; needs a synthesizer (pip install "
        "midirenderer) and a SoundFont",
    )
    add(
        "--soundfont",
        help="the .sf2 or .sf3 file with the sounds of --wav; without it the one that the environment "
        "variable SOUNDFONT names, or one that is installed",
        metavar="FILE",
    )
    add("--tokens", help="also write the song's tokens, ids and names, into this .json file")
    add(
        "--stream",
        action="store_true",
        help="write each new bar to standard output when it is complete, a line of JSON",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace the output files if they exist; prompt, given song and SoundFont are never replaced",
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
    add("--int8", action="store_true", help="on a CPU: weights of 8 bits, faster and slightly less exact")
    add(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="write by CUDA graphs, in bfloat16; a seed gives another song than without (default: on a GPU)",
    )
    add(
        "--cache_dtype",
        default="model",
        choices=CACHE_DTYPES,
        help="of keys and values in CUDA graphs: the model's, or fp8, half the memory and less exact",
    )
    add(
        "--num",
        type=cli.positive_int,
        default=1,
        help="write N songs at once, of seeds --seed, --seed + 1 and so on: song-1.mid, song-2.mid, ...",
        metavar="N",
    )
    add_wishes(parser)
    add_given(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if the song is finished, `STOPPED` if it was stopped on request."""
    args = make_parser().parse_args(argv)
    if args.prompt_bars and not args.prompt:
        raise UserError("--prompt_bars needs --prompt")
    if args.given is None and (args.add or args.keep or args.replace_bars):
        raise UserError("--add, --keep and --replace_bars need --given")
    if args.picture and not args.picture.lower().endswith(".png"):
        raise UserError(f"--picture {args.picture}: must end in .png")
    if args.wav and not args.wav.lower().endswith(".wav"):
        raise UserError(f"--wav {args.wav}: must end in .wav")
    if args.soundfont and not args.wav:
        raise UserError("--soundfont needs --wav")
    constraints = read_constraints(args)
    synthesizer = Synthesizer.find(args.soundfont) if args.wav else None
    outputs = {
        flag if args.num == 1 else f"{flag} {number}": path
        for number in range(1, args.num + 1)
        for flag, path in paths_of(args, number).items()
        if path is not None
    }
    with StopRequest("will keep the complete bars and stop; Ctrl-C stops without keeping them") as request:
        inputs = {"--prompt": args.prompt, "--given": args.given, "--soundfont": args.soundfont}
        if synthesizer is not None:  # it may have been found by itself
            inputs["the SoundFont"] = str(synthesizer.soundfont)
        require_outputs(outputs, inputs, args.overwrite)
        return write_songs(args, constraints, synthesizer, request)


def paths_of(args: argparse.Namespace, number: int) -> dict[str, str | None]:
    """Where a song goes, by flag; None for what is not asked for. Of several, song.mid becomes song-2.mid."""

    def numbered(path: str | None) -> str | None:
        if args.num == 1 or not path or not Path(path).name:
            return path
        return str(Path(path).with_stem(f"{Path(path).stem}-{number}"))

    return {f"--{name}": numbered(getattr(args, name)) for name in ("output", "picture", "wav", "tokens")}


@dataclass
class Song:
    """A song that is written: its draft, its progress, and where it goes."""

    draft: Draft
    progress: Progress
    output: str
    picture: str | None
    wav: str | None
    tokens: str | None
    stream: BarStream | None

    def show(self) -> None:
        """Show what a token more means for the progress, and for the bars that are complete."""
        self.progress.on_token(self.draft.new_tokens, self.draft.new_bars)
        if self.stream is not None:
            self.stream.write(self.draft.ids, self.draft.bar_line)


def tell(song: Song, text: str) -> None:
    """Print `text`, unless bars go to standard output, to which it would be no JSON."""
    print(text, file=sys.stdout if song.stream is None else sys.stderr)


def write_songs(
    args: argparse.Namespace, constraints: Constraints, synthesizer: Synthesizer | None, request: StopRequest
) -> int:
    """Generate songs and write them; returns the exit code.

    Args:
        synthesizer: for --wav.

    Raises:
        UserError: of the prompt, the checkpoint, or a file that cannot be written.
    """
    given = None if args.given is None else read_given(args, constraints)
    if given is not None and given.melody is not None:
        print(f"{instrument_name(given.melody)} plays the melody of {args.given}", file=sys.stderr)
    prompt = None if args.prompt is None else read_prompt(args.prompt, args.prompt_bars)
    if prompt is not None and constraints.instruments is not None:
        prompt = attributes.with_instruments(prompt, constraints.instruments)
    device = pick_device(args.device)
    graphs = uses_graphs(args.graphs, device)
    cache_dtype = pick_cache_dtype(args.cache_dtype, graphs, device)
    if args.int8:
        require_int8(device)
    model, max_context = load_model(Path(args.checkpoint), device)
    if graphs:
        model = model.bfloat16()
    attention = pick_attention(args.attention, model.device, model.config)
    bars = args.bars if given is None else given.outline.whole_bars
    draw = {"max_tokens": args.max_tokens, "sampling": read_sampling(args)}
    shared = None if args.num == 1 else progress_bar(bars, args.max_tokens, args.num)
    songs = []
    for number in range(1, args.num + 1):
        draw["seed"] = args.seed + number - 1
        if given is None:
            draft = Draft(prompt, bars=args.bars, constraints=constraints, **draw)
        else:
            draft = OutlinedDraft(given.outline, constraints=replace(constraints, instruments=None), **draw)
        progress = Progress(bars, args.max_tokens, request, shared)
        stream = BarStream(number, draft.begin) if args.stream else None
        songs.append(Song(draft, progress, *paths_of(args, number).values(), stream))
    drafts = [song.draft for song in songs]
    reason = cannot_write(drafts, cache_dtype) if graphs else None
    if graphs and reason is None:
        turns = write_on_device(model, drafts, max_context, attention, cache_dtype=cache_dtype)
    else:
        turns = write(model, drafts, max_context, attention, args.int8)
    if reason is not None:
        print(f"songs are written {reason}", file=sys.stderr)
    for number in turns:
        songs[number].show()
        if request.reason is not None:
            for song in songs:
                if not song.draft.finished and song.progress.stop():
                    song.draft.stop()
            break
    if shared is not None:
        shared.close()
    codes, errors, written = [], [], []
    begin = 0 if prompt is None else len(prompt)
    for song in songs:
        try:
            code, midi = write_song(song, begin, given, max_context)
        except UserError as error:  # the others are to be written first
            errors.append(error)
        else:
            codes.append(code)
            written += [] if midi is None else [(song, midi)]
    # They take long, and a second Ctrl-C, which ends at once, must not cost a song that is finished.
    for song, midi in written:
        try:
            write_picture_and_audio(song, midi, synthesizer)
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(songs) == 1 else UserError(f"{len(errors)} of {len(songs)} songs: {errors[0]}")
    return max(codes)


def write_song(
    song: Song, begin: int, given: Given | None, max_context: int
) -> tuple[int, miditoolkit.MidiFile | None]:
    """Write a song and its tokens, and tell what it is.

    Args:
        begin: how many of its tokens are the prompt's.

    Returns:
        the exit code, and the song; None if it was stopped before there was anything to write.

    Raises:
        UserError: there is nothing to write, or a file cannot be written.
    """
    ids, progress = song.draft.song(), song.progress
    if song.stream is not None:
        song.stream.write(ids.tolist(), len(ids) - 1)
    music = NewMusic.of(ids, begin) if given is None else NewMusic.of_outline(ids, given.outline)
    progress.close(music.bars if given is None else given.outline.whole_bars)
    if given is None and (not music.bars or not vocab.P.mask(ids).any()):
        nothing = f"so {song.output} is not written"
        if progress.stopped_by:
            tell(song, f"stopped by {progress.stopped_by} before a bar with notes was complete, {nothing}")
            return STOPPED, None
        raise UserError(
            f"the model wrote no note in {progress.tokens} tokens, {nothing}: raise --max_tokens, or try "
            "another --seed or --temperature"
        )
    if given is None:
        midi = HIDTokenizer().decode(ids)
    else:
        midi = copy.deepcopy(given.song)
        given.outline.put_into(midi, ids)
    try:
        write_midi(midi, song.output)
    except OSError as error:
        raise UserError(
            f"cannot write {song.output}: {error.strerror or error}. The song is lost, but the same --seed "
            "writes it again"
        ) from None
    told = hints(music, progress, max_context) if given is None else hints_of_given(music, progress)
    tell(song, "\n".join([f"{song.output}: {music}", *told]))
    if song.tokens:
        try:
            write_tokens(ids, song.tokens)
        except OSError as error:
            raise UserError(f"cannot write the tokens {song.tokens}: {error.strerror or error}") from None
    return STOPPED if progress.stopped_by else 0, midi


def write_picture_and_audio(song: Song, midi: miditoolkit.MidiFile, synthesizer: Synthesizer | None) -> None:
    """Write those that are asked for.

    Raises:
        UserError: one of them cannot be written.
    """
    if song.picture:
        from .plots.piano_roll import piano_roll  # matplotlib is slow to import, and only needed here

        piano_roll(midi, song.picture)
    if synthesizer is not None:
        try:
            synthesizer.write_wav(midi, song.wav)
        except OSError as error:
            raise UserError(f"cannot write the audio {song.wav}: {error.strerror or error}") from None


if __name__ == "__main__":
    cli.run(main)
