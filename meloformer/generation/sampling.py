"""How the next token is drawn from the model's logits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ..tokens import vocab

# What a temperature of its own can be given, and the families of tokens it is for.
KINDS: dict[str, tuple[vocab.Family, ...]] = {
    "rhythm": (vocab.T, vocab.L),
    "pitch": (vocab.P,),
    "velocity": (vocab.V,),
    "instrument": (vocab.BAND, vocab.INST),
    "chord": (vocab.CHORD,),
}


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from.

    temperature: divides the logits; 0 always takes the most likely token.
    top_k: draw from the k most likely tokens only.
    top_p: draw from the smallest set of most likely tokens whose probabilities sum to this or more
        (nucleus sampling, Holtzman et al. 2020).
    min_p: draw from tokens at least this times as likely as the most likely one (Nguyen et al. 2024,
        arXiv:2407.01082).
    kind_temperatures: by name of `KINDS`, a temperature for the choice among tokens of that kind, instead of
        `temperature`; how likely it is that one of them comes at all stays. Without effect if `temperature`
        is 0.

    Of `top_k`, `top_p` and `min_p` every one that is given leaves tokens out; the most likely one stays.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    kind_temperatures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if unknown := set(self.kind_temperatures) - set(KINDS):
            raise ValueError(f"no kinds of tokens: {sorted(unknown)}; there are {', '.join(KINDS)}")

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """One token id from logits [V] (float32 on CPU; -inf for ids that must not be drawn)."""
        ids, weights = self.distribution(logits.numpy())
        sums = weights.cumsum()
        drawn = float(torch.rand((), generator=generator, dtype=torch.float64)) * sums[-1]
        # Rounded, the product may be the whole sum.
        return int(ids[min(np.searchsorted(sums, drawn, side="right"), len(ids) - 1)])

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids that may be drawn, rising, and how likely they are: float64, above 0, of any sum.

        Args:
            logits: [V], -inf for ids that must not be drawn; one at least is finite.
        """
        ids = np.flatnonzero(logits != -np.inf)  # few, as a rule: all that follows is of these alone
        logits = logits[ids].astype(np.float64)
        if self.temperature == 0:
            return ids[[logits.argmax()]], np.ones(1)
        scaled = (logits - logits.max()) / self.temperature
        for kind, temperature in self.kind_temperatures.items():
            for family in KINDS[kind]:
                among = slice(*np.searchsorted(ids, (family.start, family.stop)))
                if among.start < among.stop:
                    scaled[among] = _redistributed(scaled[among], logits[among], temperature)
        weights = np.exp(scaled - scaled.max())
        kept = (weights > 0) & (weights >= self.min_p)
        if self.top_k is not None or self.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            sum_before = weights[order].cumsum() - weights[order]
            left_out = sum_before >= self.top_p * weights.sum()  # never the first: top_p is above 0
            left_out[self.top_k or len(ids) :] = True
            kept[order[left_out]] = False
        return ids[kept], weights[kept]


# Drawn like the model says, a part often enters late or pauses for bars on end, which one that is left out by
# chance keeps doing; with these, drums and bass play on as in songs, and chords return as often.
DEFAULT_SAMPLING = Sampling(min_p=0.01, kind_temperatures={"instrument": 0.5})


def _redistributed(scaled: np.ndarray, logits: np.ndarray, temperature: float) -> np.ndarray:
    """Scaled logits of the same sum of exponentials as `scaled`, distributed by logits / temperature."""
    together = np.logaddexp.reduce(scaled)
    if temperature == 0:
        alone = np.full_like(scaled, -np.inf)
        alone[logits.argmax()] = together
        return alone
    within = (logits - logits.max()) / temperature
    return together + within - np.logaddexp.reduce(within)
