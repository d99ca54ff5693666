"""How the next token is drawn from the model's logits: temperature, top-k and top-p."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from.

    temperature: divides the logits; 0 always takes the most likely token.
    top_k: draw from the k most likely tokens only.
    top_p: draw from the smallest set of most likely tokens whose probabilities sum to this or more
        (nucleus sampling, Holtzman et al. 2020). Applies together with top_k.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """One token id from logits [V] (float32 on CPU; -inf for ids that must not be drawn)."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = (logits.double() - logits.max()) / self.temperature
        probabilities, order = torch.softmax(scaled, dim=-1).sort(descending=True)
        if self.top_k is not None:
            probabilities[self.top_k :] = 0
        sum_before = probabilities.cumsum(0) - probabilities
        probabilities[sum_before >= self.top_p] = 0  # never the first one: top_p is above 0
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])
