"""The generation loop: token by token, a new song or the continuation of one.

There is no cache yet: each token costs a forward pass over all tokens before it.
"""

from collections.abc import Callable

import numpy as np
import torch

from ..kernels import Structure
from ..model.device import pick_attention
from ..model.transformer import MeloFormer
from ..tokens import attributes, vocab
from ..tokens.grammar import check
from .constraints import Constraints
from .sampling import Sampling

DEFAULT_MAX_TOKENS = 4096
PLAIN_SAMPLING = Sampling()
UNCONSTRAINED = Constraints()


def context(ids: np.ndarray, limit: int) -> np.ndarray | None:
    """The longest end of a song that begins at a bar line and has at most `limit` tokens.

    It restates the band list, time signature and tempo, as the samples of training do. None if the last bar
    alone is too long.
    """
    if len(ids) <= limit:
        return ids
    points = attributes.cut_points(ids)
    for point in points[np.searchsorted(points, len(ids) - limit) :]:
        header, skip = attributes.restated(ids, int(point))
        kept = np.concatenate((header, ids[point + skip :]))
        if len(kept) <= limit:
            return kept
    return None


@torch.inference_mode()
def next_logits(model: MeloFormer, ids: np.ndarray, attention: str) -> torch.Tensor:
    """Logits [VOCAB_SIZE] (float32 on CPU) of the token after `ids` [n]."""
    device = model.device
    scanned = attributes.scan(ids)
    length, bars = len(ids), int(scanned.bar[-1]) + 1
    if device.type == "cuda":  # kernels are compiled for each new shape: round up to a few
        length, bars = (max(256, 1 << (n - 1).bit_length()) for n in (length, bars))

    def padded(values: np.ndarray, padding: int) -> torch.Tensor:
        batch = np.full((1, length), padding, dtype=np.int64)
        batch[0, : len(ids)] = values
        return torch.from_numpy(batch)

    structure = Structure.build(
        padded(0, -1),
        *(padded(values, 0) for values in (scanned.bar, scanned.inst, scanned.kind, scanned.onset)),
        num_summaries=bars,
        near_bars=model.config.near_bars,
        kind_rule=model.config.kind_rule,
    )
    logits = model(padded(ids, vocab.PAD).to(device), structure.to(device), attention)
    return logits[0, len(ids) - 1, : vocab.VOCAB_SIZE].float().cpu()


def generate(
    model: MeloFormer,
    prompt: np.ndarray | None = None,
    *,
    bars: int | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling = PLAIN_SAMPLING,
    constraints: Constraints = UNCONSTRAINED,
    seed: int = 0,
    max_context: int = 24576,
    attention: str = "auto",
    on_token: Callable[[int, int], None] = lambda tokens, bars: None,
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Token ids (uint16 [n]) of a whole song, BOS and EOS included: the prompt, then what the model adds.

    Args:
        model: in eval mode.
        prompt: ids of a song; an EOS is removed. None begins a new song.
        bars: number of new bars; None lets the model decide where to end.
        max_tokens: maximum number of new tokens. Where it ends the song, and where a single bar is longer
            than `max_context`, the song is cut after its last complete note.
        sampling: how tokens are drawn.
        constraints: what the new bars must keep to.
        seed: of the random draws.
        max_context: maximum number of tokens the model sees at once; older bars are left out.
        attention: name of a backend, or "auto".
        on_token: called after every token with the number of new tokens and of new bars begun.
        stop: called after every token; True ends the song after its last complete bar. Where there is no
            new one, what is left is the prompt, or BOS and EOS alone.

    Raises:
        ValueError: `bars` is below 1, the prompt breaks the grammar, or none of the instruments that
            `constraints` allows is in its band list (`attributes.with_instruments` adds them).
    """
    if bars is not None and bars < 1:
        raise ValueError(f"bars must be positive, got {bars}")
    ids = [vocab.BOS] if prompt is None else [int(i) for i in prompt if i != vocab.EOS]
    grammar = check(np.array(ids))
    constraints.check_band(grammar)
    generator = torch.Generator().manual_seed(seed)
    attention = pick_attention(attention, model.device, model.config)
    within_constraints = constraints.allowed_ids()
    has_note = any(token in vocab.P for token in ids)
    begin = complete = len(ids)  # the first `complete` tokens form a song that may end there
    bar_line = begin  # and the first `bar_line` tokens one that ends with a complete bar
    new_bars = 0

    while len(ids) - begin < max_tokens:
        allowed = grammar.allowed() & within_constraints
        token = constraints.required_id(grammar, allowed) if new_bars or grammar.lists_band else None
        if token is None:
            last_bar = new_bars == bars and grammar.bar_ends
            if (
                len(ids) == begin and not grammar.lists_band
            ):  # a new bar begins here, whatever the prompt ends with
                allowed[: vocab.CHORD.start] = allowed[vocab.CHORD.stop :] = False
            if grammar.inside_bar:  # no new time signature between the parts of a long bar
                allowed[vocab.TS.start : vocab.TS.stop] = False
            if new_bars == 0 or not has_note or (bars is not None and not last_bar):
                allowed[vocab.EOS] = False
            if last_bar and not has_note:
                allowed[vocab.CHORD.start : vocab.CHORD.stop] = False
            seen = context(np.array(ids), max_context)
            if seen is None:
                break
            logits = next_logits(model, seen, attention)
            token = sampling.draw(logits.masked_fill(~torch.from_numpy(allowed), -torch.inf), generator)
            if token == vocab.EOS or (token in vocab.CHORD and last_bar):
                complete = len(ids)
                break
        if token in vocab.CHORD and grammar.bar_ends:
            new_bars += 1
            if new_bars > 1:
                bar_line = len(ids)
        ids.append(token)
        grammar.push(token)
        has_note = has_note or token in vocab.P
        if grammar.bar_complete:
            complete = len(ids)
        on_token(len(ids) - begin, new_bars)
        if stop():
            complete = bar_line
            break
    return np.array([*ids[:complete], vocab.EOS], dtype=np.uint16)
