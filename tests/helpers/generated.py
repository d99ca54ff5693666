"""A whole song by a model, in one call."""

from collections.abc import Callable

import numpy as np

from meloformer.generation.draft import Draft
from meloformer.generation.loop import MAX_CONTEXT, write
from meloformer.model.transformer import MeloFormer


def generate(
    model: MeloFormer,
    prompt: np.ndarray | None = None,
    *,
    max_context: int = MAX_CONTEXT,
    attention: str = "auto",
    on_token: Callable[[int, int], None] = lambda tokens, bars: None,
    stop: Callable[[], bool] = lambda: False,
    **wishes,
) -> np.ndarray:
    """Token ids (uint16 [n]) of a `Draft(prompt, **wishes)` that is written to its end.

    Args:
        on_token: called after every token with the number of new tokens and of new bars begun.
        stop: called after every token; True stops the draft.
    """
    draft = Draft(prompt, **wishes)
    for _ in write(model, [draft], max_context, attention):
        on_token(draft.new_tokens, draft.new_bars)
        if stop():
            draft.stop()
            break
    return draft.song()
