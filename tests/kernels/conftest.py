import pytest
import torch

from meloformer.kernels import plan as plan_module

from helpers.plan_cases import Room


@pytest.fixture(autouse=True)
def room_for_plans(monkeypatch):
    """Interpreted plans are made once, with room enough, not first with a guess; `TestCapacity` guesses."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(plan_module, "_capacities", Room())
