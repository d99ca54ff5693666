"""How the next token is drawn from the model's logits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.double()
        scaled = (logits - logits.max()) / self.temperature
        for kind, temperature in self.kind_temperatures.items():
            for family in KINDS[kind]:
                among = slice(family.start, family.stop)
                scaled[among] = _redistributed(scaled[among], logits[among], temperature)
        probabilities, order = torch.softmax(scaled, dim=-1).sort(descending=True)
        left_out = probabilities < self.min_p * probabilities[0]
        if self.top_k is not None:
            left_out[self.top_k :] = True
        sum_before = probabilities.cumsum(0) - probabilities
        left_out |= sum_before >= self.top_p  # never the first one: top_p is above 0
        probabilities[left_out] = 0
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])


# Drawn like the model says, a part often enters late or pauses for bars on end, which one that is left out by
# chance keeps doing; with these, drums and bass play on as in songs, and chords return as often.
DEFAULT_SAMPLING = Sampling(min_p=0.01, kind_temperatures={"instrument": 0.5})


def _redistributed(scaled: torch.Tensor, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Scaled logits of the same sum of exponentials as `scaled`, distributed by logits / temperature."""
    together = scaled.logsumexp(0)
    if together == -torch.inf:  # none of them may come
        return scaled
    if temperature == 0:
        return torch.full_like(scaled, -torch.inf).index_fill_(0, logits.argmax(), together)
    return together + torch.log_softmax((logits - logits.max()) / temperature, 0)
