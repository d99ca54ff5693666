"""`python -m meloformer.compose`: songs by the procedural composer, as MIDI files."""

from pathlib import Path

from . import cli
from .composer.compose import compose_corpus
from .errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(
        prog="python -m meloformer.compose",
        description="Compose songs by rules, without a model, and write them as MIDI files.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the .mid files")
    parser.add_argument("--count", type=cli.positive_int, default=40, help="number of songs")
    parser.add_argument("--seed", type=int, default=0, help="random seed: another one gives other songs")
    args = parser.parse_args(argv)
    try:
        paths = compose_corpus(args.output, args.count, args.seed)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or args.output}: {error.strerror}") from None
    print(f"wrote {len(paths)} songs to {args.output}")


if __name__ == "__main__":
    cli.run(main)
