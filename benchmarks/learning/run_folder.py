"""Reads the folder of a finished training run for a comparison: settings, speed and validation losses.

Time is what the training meter counts: that of the steps, without validation, sampling and saving.
"""

from itertools import accumulate
from pathlib import Path
from statistics import median

import yaml

from benchmarks.common.attention_label import ORIGINAL_RULE
from benchmarks.learning.ablation import lacking
from meloformer.errors import UserError
from meloformer.files import parse_json
from meloformer.training.config import CONFIG
from meloformer.training.run_log import LOG, read_log
from meloformer.training.summary import SUMMARY

SLOW = 10  # times the median step: such a step compiled something, or waited for another process
# Settings that change neither what is learned from the same tokens nor the time of the steps.
_IRRELEVANT = (
    *("data_dir", "output_dir", "device", "max_skipped_steps", "sample_every", "save_every"),
    *("save_every_minutes", "keep_last", "tensorboard", "wandb"),
)
_VARIED = ("attention", "kind_rule", "near_bars", "seed")  # what runs that are compared may differ in


def read_run(folder: Path) -> dict:
    """A run as JSON values.

    Returns:
        `name`, `attention`, `kind_rule`, `near_bars`, `without` (see `ablation`), `seed`; `settings` and
        `origin`, which must be equal in all runs of a comparison; figures of its summary; `tokens_per_s` over
        all steps except slow ones (the first, and those of more than `SLOW` times the median step);
        `slow_steps` and `slow_seconds`;
        `validation`, lists with an entry for each validation: `step`, `tokens` so far, `seconds` of the
        steps that were not slow, `all_seconds`, and the figures of `validation.validate`.

    Raises:
        UserError: the run has not finished, its files are damaged, or there are fewer than two validations.
    """
    summary, config = _read(folder / SUMMARY), _read(folder / CONFIG)
    if not summary.get("finished"):
        raise UserError(f"{folder}: the run has not finished; continue it with --resume")
    if "data" not in summary:
        raise UserError(f"{folder}: trained by an older version that did not record its data; train it again")
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

    losses = [key for key in validations[at[0] + 1] if key.startswith("val_") and "perplexity" not in key]
    return {
        "name": folder.resolve().name,
        "attention": summary["attention"],
        **{name: config.get(name, original) for name, original in ORIGINAL_RULE.items()},
        "without": lacking(folder),
        "seed": config["seed"],
        "settings": {key: value for key, value in config.items() if key not in (*_IRRELEVANT, *_VARIED)},
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
    """The records of steps and of validations, by step; the last one if a resumed run repeated a step."""
    records = read_log(folder / LOG)
    steps = {r["step"]: r for r in records if "loss" in r}
    validations = {r["step"]: r for r in records if "val_loss" in r}
    if len(steps) < 2 or len(validations) < 2:
        raise UserError(f"{folder}: needs at least two steps and two validations (--validate_every)")
    if sorted(steps) != list(range(1, count + 1)):
        raise UserError(f"{folder}: its log lacks some of the steps 1 to {count}")
    for step, record in validations.items():
        if record["val_loss"] is None:
            raise UserError(f"{folder}: the validation loss of step {step} is not finite")
    return steps, validations


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        found = parse_json(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; is it the folder of a finished run?"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is damaged")
    return found
