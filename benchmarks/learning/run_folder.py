"""What a finished training run left in its folder, for comparing it with others: one run as JSON values.

The time axis of a curve is the meter's: the seconds of the steps, without validating, sampling and saving.
"""

import json
from itertools import accumulate
from pathlib import Path
from statistics import median

import yaml

from meloformer.errors import UserError
from meloformer.kernels.structure import KIND_RULE
from meloformer.training.config import CONFIG
from meloformer.training.run_log import LOG, read_log
from meloformer.training.summary import SUMMARY

SLOW = 10  # a step that takes so many times the median step compiled, or waited for something foreign
# Settings that change neither what is learned from the same tokens nor how fast the steps are, by the meter.
_FREE = (
    *("data_dir", "output_dir", "device", "max_skipped_steps", "sample_every", "save_every"),
    *("save_every_minutes", "keep_last", "tensorboard", "wandb"),
)
_OWN = ("attention", "kind_rule", "seed")  # in which runs that are compared may differ


def read_run(folder: Path) -> dict:
    """A run as JSON values.

    Returns:
        `name`, `attention`, `kind_rule`, `seed`; `settings` and `origin`, which must be equal to compare it;
        what its summary tells; `tokens_per_s` over all steps but the slow ones (the first, and those of more
        than `SLOW` times the median step); `slow_steps` and `slow_seconds`; `validation`, columns with an
        entry for each validation: `step`, `tokens` seen, `seconds` of the steps that were not slow,
        `all_seconds`, and the losses in nats per token, `val_loss` and by kind of token.

    Raises:
        UserError: it has not ended, or holds too little to be compared.
    """
    summary, config = _read(folder / SUMMARY), _read(folder / CONFIG)
    if not summary.get("finished"):
        raise UserError(f"{folder}: the run is not through; go on with it by --resume")
    if "data" not in summary:
        raise UserError(f"{folder}: an older version trained it and did not note its data: train it anew")
    steps, validations = _log(folder, summary["steps"])
    tokens = [steps[step]["tokens"] for step in sorted(steps)]
    seconds = [steps[step]["tokens"] / steps[step]["tokens_per_s"] for step in sorted(steps)]
    usual = median(seconds)
    slow = [number == 0 or taken > SLOW * usual for number, taken in enumerate(seconds)]
    steady = [0.0 if is_slow else taken for taken, is_slow in zip(seconds, slow)]
    at = [step - 1 for step in sorted(validations)]

    def until(values: list) -> list:
        sums = list(accumulate(values))
        return [sums[index] for index in at]

    losses = [key for key in validations[at[0] + 1] if key.startswith("val_loss")]
    return {
        "name": folder.resolve().name,
        "attention": summary["attention"],
        "kind_rule": config.get("kind_rule", KIND_RULE),  # not there if the run is older than the choice
        "seed": config["seed"],
        "settings": {key: value for key, value in config.items() if key not in (*_FREE, *_OWN)},
        "origin": {key: summary[key] for key in ("data", "device", "processes", "precision", "versions")},
        **{key: summary[key] for key in ("parameters", "steps", "epochs", "tokens", "skipped_steps")},
        "tokens_per_s": sum(n for n, is_slow in zip(tokens, slow) if not is_slow) / sum(steady),
        "slow_steps": sum(slow),
        "slow_seconds": sum(taken for taken, is_slow in zip(seconds, slow) if is_slow),
        "validation": {
            "step": [index + 1 for index in at],
            "tokens": until(tokens),
            "seconds": until(steady),
            "all_seconds": until(seconds),
            **{key: [validations[index + 1][key] for index in at] for key in losses},
        },
    }


def _log(folder: Path, count: int) -> tuple[dict[int, dict], dict[int, dict]]:
    """The records of steps and of validations, by step; of several records of one the last counts."""
    records = read_log(folder / LOG)
    steps = {r["step"]: r for r in records if "loss" in r}
    validations = {r["step"]: r for r in records if "val_loss" in r}
    if len(steps) < 2 or len(validations) < 2:
        raise UserError(f"{folder}: needs two steps and two validations at least (--validate_every)")
    if sorted(steps) != list(range(1, count + 1)):
        raise UserError(f"{folder}: its log does not hold every step of 1 to {count}")
    for step, record in validations.items():
        if record["val_loss"] is None:
            raise UserError(f"{folder}: the validation loss of step {step} is not finite")
    return steps, validations


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; is it the folder of a finished run?"
        ) from None
    except (yaml.YAMLError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is damaged")
    return found
