"""`python -m meloformer.export`: copy a checkpoint without its training state, for `generate`."""

from pathlib import Path

from . import cli
from .checkpoint.store import best_checkpoint, export_model, find_checkpoint, latest_checkpoint
from .errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(
        prog="python -m meloformer.export",
        description="Copy the model, its configuration and its tokenizer from a checkpoint to a folder "
        "that meloformer.generate loads.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        help="a checkpoint, or the output folder of a training run (its newest checkpoint)",
    )
    add("--output", required=True, help="the folder to create; it must not exist")
    add(
        "--best",
        action="store_true",
        help="take a run's checkpoint of the lowest validation loss instead of the newest",
    )
    args = parser.parse_args(argv)
    if args.best:
        checkpoints = Path(args.checkpoint) / "checkpoints"
        path = best_checkpoint(checkpoints)
        if path is None:
            latest_checkpoint(checkpoints)  # if none can be read, it says why
            raise UserError(f"{args.checkpoint} is no run with a validation loss: leave out --best")
    else:
        path = find_checkpoint(args.checkpoint)
    export_model(path, args.output)
    print(f"{args.output}: the model of {path}")


if __name__ == "__main__":
    cli.run(main)
