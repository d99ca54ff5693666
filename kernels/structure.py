"""Which tokens attend to which: the properties of every token, and the visibility rule.

Every backend and every mask is made from `summary_sees` and `regular_sees`; they work elementwise on
any tensors that broadcast, 0-d tensors inside a FlexAttention mask_mod included.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

DRUMS = 128
NO_INSTRUMENT = 129
NEAR_BARS = (0, 1)  # with KIND_RULE: what learned best, see docs/attention.md
KIND_RULE = "any"

MIN_SUMMARIES = 128


def summary_room(bars: int) -> int:
    """M, the number of summaries to make room for: `bars` rounded up to one of few sizes.

    At least `MIN_SUMMARIES`; beyond, there are four sizes from one power of two to the next. Few sizes mean
    few compiled variants of a model.
    """
    if bars <= MIN_SUMMARIES:
        return MIN_SUMMARIES
    step = 1 << ((bars - 1).bit_length() - 3)
    return -(-bars // step) * step


class Kind(IntEnum):
    """What a token says: a note attribute, or (STRUCTURAL) BOS, EOS, CHORD, TS, BPM, INST."""

    STRUCTURAL = 0
    T = 1
    P = 2
    L = 3
    V = 4


# The rule compares with plain ints: under torch.compile (PyTorch 2.13), `tensor == Kind.T` is silently
# False everywhere. That includes FlexAttention, which traces its mask_mod even when uncompiled.
_STRUCTURAL, _T, _P, _L, _V = map(int, Kind)

# By name: (queries, keys) of which each query sees every key, besides structural tokens and its onset group.
KIND_RULES: dict[str, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    # The original scheme: a token sees its like.
    "alike": (((_T, _P), (_T, _P)), ((_V,), (_V,))),
    # A query predicts the token after it: it sees the kinds that usually follow its own in [T] P [L] [V].
    "next": (((_T, _P, _V), (_T, _P)), ((_P,), (_L,)), ((_L,), (_V,))),
    # The bar rule alone is left.
    "any": (((_T, _P, _L, _V), (_T, _P, _L, _V)),),
}

SUMMARY = -1  # the kind of a summary token


class TokenProperties(NamedTuple):
    """What the visibility rule reads of some tokens: integer tensors of one shape.

    A document of -1 marks padding. A summary token has kind `SUMMARY`, and of the rest only `doc`,
    `bar` and `position` mean something.
    """

    doc: Tensor
    bar: Tensor
    inst: Tensor
    kind: Tensor
    onset: Tensor
    position: Tensor

    def at(self, *index) -> "TokenProperties":
        """Those of the tokens picked by indexing every tensor with `index`."""
        return TokenProperties(*(fact[index] for fact in self))


def summary_sees(s: TokenProperties, u: TokenProperties) -> Tensor:
    """Whether summary token `s` attends to `u`, a summary (SS) or a regular token (SR)."""
    ss = u.bar <= s.bar
    sr = u.bar == s.bar
    return _same_document(s, u) & torch.where(u.kind == SUMMARY, ss, sr)


def regular_sees(
    t: TokenProperties, u: TokenProperties, near_bars: tuple[int, ...], kind_rule: str
) -> Tensor:
    """Whether regular token `t` attends to `u`, a summary (RS) or a regular token (RR).

    `near_bars` and `kind_rule` are those of `Structure`.
    """
    rs = u.bar < t.bar  # only bars that are complete: this keeps summaries causal
    rr = (u.position <= t.position) & _bar_rule(t, u, near_bars) & _kind_rule(t, u, kind_rule)
    return _same_document(t, u) & torch.where(u.kind == SUMMARY, rs, rr)


def _same_document(t: TokenProperties, u: TokenProperties) -> Tensor:
    return (t.doc == u.doc) & (u.doc >= 0)


def _bar_rule(t: TokenProperties, u: TokenProperties, near_bars: tuple[int, ...]) -> Tensor:
    visible = is_global(u) | (t.inst == u.inst)
    for distance in near_bars:
        visible = visible | (t.bar - u.bar == distance)
    return visible


def _kind_rule(t: TokenProperties, u: TokenProperties, name: str) -> Tensor:
    visible = _is_structural(t) | _is_structural(u) | (t.onset == u.onset)
    for queries, keys in KIND_RULES[name]:
        visible = visible | (_is_any(t, queries) & _is_any(u, keys))
    return visible


def is_global(u: TokenProperties) -> Tensor:
    """Structural without an instrument: every structural token but INST."""
    return _is_structural(u) & (u.inst == NO_INSTRUMENT)


def _is_structural(u: TokenProperties) -> Tensor:
    return u.kind == _STRUCTURAL


def _is_any(u: TokenProperties, kinds: tuple[int, ...]) -> Tensor:
    first, *others = kinds
    found = u.kind == first
    for kind in others:
        found = found | (u.kind == kind)
    return found


def kinds_seen(kind_rule: str) -> tuple[int, ...]:
    """For each `Kind` as a query those it sees whatever the onset, as a number: the sum of `1 << kind`."""
    everything = sum(1 << kind for kind in Kind)
    seen = [everything if kind == _STRUCTURAL else 1 << _STRUCTURAL for kind in Kind]
    for queries, keys in KIND_RULES[kind_rule]:
        for query in queries:
            seen[query] |= sum(1 << key for key in keys)
    return tuple(seen)


@dataclass(frozen=True, eq=False)
class Structure:
    """The structure of a batch of packed rows: int32 tensors on one device. Make it with `build`.

    Attributes:
        doc, bar, inst, kind, onset, position: [B, N], the regular tokens.
        summary_doc, summary_bar, summary_position: [B, M], the summary tokens, one per bar in order of the
            row.
        near_bars: distances, in bars, at which a token sees other instruments.
        kind_rule: which kinds of other notes' tokens a note's token sees, one of `KIND_RULES`.

    Padding of either stream has document -1: it sees nothing and nothing sees it.
    """

    doc: Tensor
    bar: Tensor
    inst: Tensor
    kind: Tensor
    onset: Tensor
    position: Tensor
    summary_doc: Tensor
    summary_bar: Tensor
    summary_position: Tensor
    near_bars: tuple[int, ...] = NEAR_BARS
    kind_rule: str = KIND_RULE

    @classmethod
    def build(
        cls,
        doc: Tensor,
        bar: Tensor,
        inst: Tensor,
        kind: Tensor,
        onset: Tensor,
        num_summaries: int | None = None,
        near_bars: tuple[int, ...] = NEAR_BARS,
        kind_rule: str = KIND_RULE,
    ) -> "Structure":
        """Derives positions and summary tokens.

        Args:
            doc: [B, N] any integer dtype (as all of these). Document of each token, ascending along
                a row; -1 for padding, which stands at the end of the row.
            bar: [B, N] not descending within a document.
            inst: [B, N] 0..127 programs, `DRUMS`, or `NO_INSTRUMENT`.
            kind: [B, N] a `Kind`.
            onset: [B, N] the same number for the notes that share a T and for no others of the
                document; -1 for structural tokens.
            num_summaries: M, at least the bars of the fullest row. None counts them, which waits for the
                device.
            near_bars, kind_rule: see the class.

        Raises:
            ValueError: the shapes differ, near_bars has a negative distance, kind_rule is unknown, or
                (on CPU) a row is out of order or has more bars than num_summaries. On CUDA, where
                looking would stall the stream, the last two are device-side assertions.
        """
        shapes = {tuple(fact.shape) for fact in (doc, bar, inst, kind, onset)}
        if len(shapes) != 1 or doc.dim() != 2:
            raise ValueError(f"properties must share one shape [B, N], got {sorted(shapes)}")
        if any(distance < 0 for distance in near_bars):
            raise ValueError(f"near_bars must not be negative, got {near_bars}")
        check_kind_rule(kind_rule)

        doc, bar, inst, kind, onset = (fact.to(torch.int32) for fact in (doc, bar, inst, kind, onset))
        real = doc >= 0
        follows = real[:, 1:] & real[:, :-1] & (doc[:, 1:] == doc[:, :-1])  # goes on with its document
        ordered = torch.where(follows, bar[:, 1:] >= bar[:, :-1], doc[:, 1:] > doc[:, :-1])
        _require((ordered | ~real[:, 1:]).all(), "documents and bars must ascend along a row")
        _require((real[:, :-1] | ~real[:, 1:]).all(), "padding must stand at the end of a row")

        rows, length = doc.shape
        index = torch.arange(length, device=doc.device, dtype=torch.int32).expand(rows, length)
        starts_doc = torch.cat([real[:, :1], real[:, 1:] & ~follows], dim=1)
        position = index - torch.where(starts_doc, index, 0).cummax(dim=1).values

        same_bar = follows & (bar[:, 1:] == bar[:, :-1])
        starts_bar = torch.cat([real[:, :1], real[:, 1:] & ~same_bar], dim=1)
        ends_bar = torch.cat([real[:, :-1] & ~same_bar, real[:, -1:]], dim=1)
        bars = starts_bar.cumsum(dim=1)  # bars begun so far in the row
        if num_summaries is None:
            num_summaries = max(1, int(bars[:, -1].max()))
        _require((bars[:, -1] <= num_summaries).all(), f"a row has more than {num_summaries} bars")

        # Tokens inside a bar, and bars beyond M, go to a spare slot that is cut off.
        slot = torch.where(ends_bar, bars - 1, num_summaries).clamp(max=num_summaries)

        def of_last_token(fact: Tensor, padding: int) -> Tensor:
            out = torch.full((rows, num_summaries + 1), padding, dtype=torch.int32, device=doc.device)
            return out.scatter_(1, slot, fact)[:, :num_summaries].contiguous()

        return cls(
            doc=doc.clamp(min=-1),
            bar=bar.where(real, 0),
            inst=inst.where(real, NO_INSTRUMENT),
            kind=kind.where(real, _STRUCTURAL),
            onset=onset.where(real, -1),
            position=position.where(real, 0),
            summary_doc=of_last_token(doc, -1),
            summary_bar=of_last_token(bar, 0),
            summary_position=of_last_token(position, 0),
            near_bars=tuple(near_bars),
            kind_rule=kind_rule,
        )

    @property
    def device(self) -> torch.device:
        return self.doc.device

    @property
    def tokens(self) -> TokenProperties:
        """Properties of the regular tokens, [B, N]."""
        return TokenProperties(self.doc, self.bar, self.inst, self.kind, self.onset, self.position)

    @property
    def summaries(self) -> TokenProperties:
        """Properties of the summary tokens, [B, M]."""
        doc = self.summary_doc
        return TokenProperties(
            doc=doc,
            bar=self.summary_bar,
            inst=torch.full_like(doc, NO_INSTRUMENT),
            kind=torch.full_like(doc, SUMMARY),
            onset=torch.full_like(doc, -1),
            position=self.summary_position,
        )

    @property
    def keys(self) -> TokenProperties:
        """Properties of what both phases attend to, [B, M + N]: the summaries, then the regular
        tokens."""
        return TokenProperties(*(torch.cat(pair, dim=1) for pair in zip(self.summaries, self.tokens)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Structure":
        """This structure on another device."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def check_kind_rule(name: str) -> None:
    """Raises ValueError if it is none of `KIND_RULES`."""
    if name not in KIND_RULES:
        raise ValueError(f"unknown kind_rule '{name}': there are {', '.join(KIND_RULES)}")


def _require(condition: Tensor, message: str) -> None:
    """Raises ValueError on CPU. On CUDA asserts on the device, so that the host need not wait."""
    if condition.device.type == "cuda":
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)
