"""Token by token: a new song, or the continuation of one, from a model.

Plain and correct: every token costs one pass over all tokens before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..checkpoint.store import find_checkpoint, load_checkpoint
from ..kernels import Structure
from ..model.device import pick_attention
from ..model.transformer import MeloFormer, ModelConfig
from ..tokens import attributes, vocab
from ..tokens.grammar import Grammar, check

DEFAULT_MAX_TOKENS = 4096


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    temperature: divides the logits; 0 takes the likeliest token. top_k: keep the k likeliest.
    top_p: keep the likeliest tokens that together reach this probability.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def pick(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """A token from logits [V] (float32 on CPU; -inf for what must not come)."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = (logits.double() - logits.max()) / self.temperature
        probabilities, order = torch.softmax(scaled, dim=-1).sort(descending=True)
        if self.top_k is not None:
            probabilities[self.top_k :] = 0
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= self.top_p] = 0  # the first always stays
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@dataclass(frozen=True)
class Wishes:
    """What the new bars must keep to; None leaves it to the model.

    signature: index into `vocab.SIGNATURES`. bpm: whole quarters a minute. instruments: numbers
    0..127 and 128 for drums. All hold from the first new bar to the end.
    """

    signature: int | None = None
    bpm: int | None = None
    instruments: tuple[int, ...] | None = None

    def allows(self) -> np.ndarray:
        """The ids these wishes do not rule out: bool [VOCAB_SIZE]."""
        mask = np.ones(vocab.VOCAB_SIZE, dtype=bool)
        if self.signature is not None:
            mask[vocab.TS.start : vocab.TS.stop] = False
            mask[vocab.CUT.start : vocab.CUT.stop] = False
            mask[vocab.TS.start + self.signature] = True
        if self.bpm is not None:
            mask[vocab.BPM.start : vocab.BPM.stop] = False
            mask[vocab.BPM.start + self.bpm - vocab.MIN_BPM] = True
        if self.instruments is not None:
            mask[vocab.INST.start : vocab.INST.stop] = False
            mask[vocab.INST.start + vocab.INSTRUMENT_RANK[list(self.instruments)]] = True
        return mask

    def due(self, grammar: Grammar, mask: np.ndarray) -> int | None:
        """The id that must come now because a wish is not met yet, if `mask` admits it."""
        if self.signature is not None and grammar.signature != self.signature:
            token = vocab.TS.start + self.signature
            if mask[token]:
                return token
        if self.bpm is not None and grammar.bpm != self.bpm:
            token = vocab.BPM.start + self.bpm - vocab.MIN_BPM
            if mask[token]:
                return token
        return None


def context(ids: np.ndarray, limit: int) -> np.ndarray | None:
    """As much of the end of a song as fits into `limit` tokens, begun at a bar line as samples are.

    None if the last bar alone does not fit.
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
    if device.type == "cuda":  # every new shape would compile anew there, so let there be few
        length, bars = (max(256, 1 << (n - 1).bit_length()) for n in (length, bars))

    def row(values: np.ndarray, padding: int) -> torch.Tensor:
        padded = np.full((1, length), padding, dtype=np.int64)
        padded[0, : len(ids)] = values
        return torch.from_numpy(padded)

    structure = Structure.build(
        row(0, -1),
        *(row(fact, 0) for fact in (scanned.bar, scanned.inst, scanned.kind, scanned.onset)),
        num_summaries=bars,
        near_bars=model.config.near_bars,
        kind_rule=model.config.kind_rule,
    )
    logits = model(row(ids, vocab.PAD).to(device), structure.to(device), attention)
    return logits[0, len(ids) - 1, : vocab.VOCAB_SIZE].float().cpu()


def generate(
    model: MeloFormer,
    prompt: np.ndarray | None = None,
    *,
    bars: int | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling = Sampling(),
    wishes: Wishes = Wishes(),
    seed: int = 0,
    max_context: int = 24576,
    attention: str = "auto",
    on_token: Callable[[int, int], None] = lambda tokens, bars: None,
) -> np.ndarray:
    """Token ids of a whole song, from BOS to EOS: the prompt and what the model adds to it.

    Args:
        model: in eval mode.
        prompt: ids of a song; its EOS, if there is one, is taken off. None begins a new song.
        bars: new bars to write; None lets the model end.
        max_tokens: new tokens at most; the song then ends after its last complete note, as it does if
            one bar outgrows `max_context`.
        sampling, wishes: see there.
        seed: of the draws.
        max_context: tokens the model sees at most; earlier bars are left out at a bar line.
        attention: name of a backend.
        on_token: called after every token with the numbers of new tokens and new bars begun.
    """
    if bars is not None and bars < 1:
        raise ValueError(f"bars must be positive, got {bars}")
    ids = [vocab.BOS] if prompt is None else [int(i) for i in prompt if i != vocab.EOS]
    grammar = check(np.array(ids))
    generator = torch.Generator().manual_seed(seed)
    attention = pick_attention(attention, model.device, model.config)
    wished = wishes.allows()
    has_note = any(token in vocab.P for token in ids)
    begin = complete = len(ids)  # `complete` tokens form a song that may end there
    new_bars = 0

    while len(ids) - begin < max_tokens:
        mask = grammar.allowed() & wished
        token = wishes.due(grammar, mask) if new_bars else None
        if token is None:
            last_bar = new_bars == bars and grammar.bar_ends
            if len(ids) == begin:  # whatever came before, a new bar begins
                mask[: vocab.CHORD.start] = mask[vocab.CHORD.stop :] = False
            if grammar.inside_bar:  # no bar line in the middle of a long bar
                mask[vocab.TS.start : vocab.TS.stop] = False
            if new_bars == 0 or not has_note or (bars is not None and not last_bar):
                mask[vocab.EOS] = False
            if last_bar and not has_note:
                mask[vocab.CHORD.start : vocab.CHORD.stop] = False
            seen = context(np.array(ids), max_context)
            if seen is None:
                break
            logits = next_logits(model, seen, attention)
            token = sampling.pick(logits.masked_fill(~torch.from_numpy(mask), -torch.inf), generator)
            if token == vocab.EOS or (token in vocab.CHORD and last_bar):
                complete = len(ids)
                break
        new_bars += token in vocab.CHORD and grammar.bar_ends
        ids.append(token)
        grammar.push(token)
        has_note = has_note or token in vocab.P
        if grammar.bar_complete:
            complete = len(ids)
        on_token(len(ids) - begin, new_bars)
    return np.array([*ids[:complete], vocab.EOS], dtype=np.uint16)


def load_model(folder: Path, device: torch.device) -> tuple[MeloFormer, int]:
    """The model of a checkpoint in eval mode, and the number of tokens it saw at once in training."""
    checkpoint = load_checkpoint(find_checkpoint(folder))
    model = MeloFormer(ModelConfig(**checkpoint.config))
    model.load_state_dict(checkpoint.weights)
    return model.to(device).eval(), checkpoint.max_seq_len
