from pathlib import Path

import pytest

from helpers.checkpoints import make_model, make_optimizer, save, train


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint with optimizer state after two steps."""
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(2))
    return save(tmp_path, 2, model, optimizer)
