"""`python -m benchmarks.generated FOLDER --output PAGE.md`: generated songs in figures and piano rolls."""

import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from benchmarks.common.machine import describe
from benchmarks.common.results_file import save, write
from benchmarks.generated.page import page
from benchmarks.generated.statistics import measure, total
from meloformer import cli
from meloformer.data.inputs import find_files
from meloformer.errors import MidiError, UserError
from meloformer.midi.reader import read_midi
from meloformer.plots.song_rows import song_rows

DRAWN = 10  # songs on the picture
PICTURE_BARS = 32


def measure_real(source: str, most_bars: int) -> dict:
    """Figures over the songs of a folder or list, at most so many bars of each; damaged files are counted.

    Raises:
        UserError: there are no files, or none can be read.
    """
    songs, refused = [], Counter()
    for path in tqdm(find_files(source), unit="file", disable=not sys.stderr.isatty()):
        try:
            songs.append(measure(read_midi(path), most_bars))
        except MidiError as error:
            refused[error.reason] += 1
    if not songs:
        raise UserError(f"--real {source}: no file could be read")
    return {"most_bars": most_bars, "refused": refused, "total": total(songs)}


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m benchmarks.generated", description=__doc__.split(": ", 1)[1])
    parser.add_argument("folder", metavar="SONGS", help="folder of MIDI files, or a list file; all are shown")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PAGE.md",
        help="the page to write, with its picture and JSON file beside it",
    )
    parser.add_argument(
        "--real",
        metavar="SONGS",
        help="real songs to put beside, a folder or a list file: their medians over as many bars as the "
        "longest song of SONGS has",
    )
    parser.add_argument("--made_by", default="", metavar="TEXT", help="how the songs were made, for the page")
    args = parser.parse_args(argv)
    if args.output.suffix != ".md":
        raise UserError(f"--output {args.output}: must end in .md")
    paths = list(map(Path, find_files(args.folder)))
    by_stem = len({path.stem for path in paths}) == len(paths)
    songs = {}
    for path in paths:
        try:
            songs[path.stem if by_stem else str(path)] = read_midi(path)
        except MidiError as error:
            # None may be missing from a page that says that songs were not picked.
            raise UserError(f"{path}: {error}") from None
    figures = {name: measure(midi) for name, midi in songs.items()}
    result = {
        "machine": describe(),
        "made_by": args.made_by,
        "drawn": DRAWN,
        "picture_bars": PICTURE_BARS,
        "songs": figures,
        "total": total(figures.values()),
        "real": None,
    }
    if args.real:
        result["real"] = measure_real(args.real, max(song["bars"] for song in figures.values()))
    picture, source = args.output.with_suffix(".png"), args.output.with_suffix(".json")
    save(result, source)
    song_rows(
        list(songs.items())[:DRAWN], picture, args.output.stem.replace("_", " ").capitalize(), PICTURE_BARS
    )
    text = page(result, picture.name, source.name)
    write(args.output, text)
    print(text)


if __name__ == "__main__":
    cli.run(main)
