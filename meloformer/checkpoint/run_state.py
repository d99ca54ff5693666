"""The state of a training run besides weights and optimizer, as `trainer.json` holds it."""

from dataclasses import dataclass
from pathlib import Path

from .files import damaged
from .schema import brief, read_dataclass

TASKS = ("validate", "sample")  # what may be due after a step


@dataclass(frozen=True)
class Best:
    """The lowest validation loss so far, and the step that it was found after."""

    step: int
    val_loss: float


@dataclass(frozen=True)
class GuardState:
    """Steps skipped in the whole run, and the last gradient norms; see `training.guard`."""

    skipped: int
    norms: tuple[float, ...]


@dataclass(frozen=True)
class RunState:
    """What a resumed run needs to know.

    Attributes:
        step: optimizer steps so far.
        total_steps: what the schedule of the learning rate was made for.
        identity: what must be the same in the resumed run.
        state: epoch and row that come next.
        tokens: trained on so far.
        due: which of `TASKS` are still to be done after the last step.
        config: the run's settings.
    """

    step: int
    total_steps: int
    identity: dict
    state: tuple[int, int]
    tokens: int
    due: tuple[str, ...]
    best: Best | None
    guard: GuardState
    config: dict


def read_run_state(values: dict, step: int, file: Path) -> RunState:
    """The state of the run that saved a checkpoint after `step` steps.

    Args:
        values: the JSON object in `file`.

    Raises:
        UserError: a part is missing, unknown, of another type, or impossible.
    """
    run = read_dataclass(RunState, values, file)
    counts = {"tokens": run.tokens, "total_steps": run.total_steps}
    counts |= {"epoch": run.state[0], "row": run.state[1], "skipped": run.guard.skipped}
    for name, count in counts.items():
        if not 0 <= count < 2**63:
            raise damaged(file, f"{name} is {brief(count)}")
    if run.guard.skipped > step:
        raise damaged(file, f"{brief(run.guard.skipped)} steps were skipped, of {step}")
    if run.step != step:
        raise damaged(file, f"it is of step {brief(run.step)}, and the checkpoint of step {step}")
    if run.best is not None and not 0 < run.best.step <= step:
        raise damaged(file, f"its best step is {brief(run.best.step)}, of {step}")
    if not set(run.due) <= set(TASKS) or len(set(run.due)) < len(run.due):
        raise damaged(file, f"due after its last step are {brief(*run.due)}")
    return run
