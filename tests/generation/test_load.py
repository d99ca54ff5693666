"""Models from checkpoints."""

from dataclasses import asdict

import pytest
import torch

from meloformer.errors import UserError
from meloformer.generation.load import load_model

from helpers.untrained import CONFIG, save_untrained, untrained


def test_a_model_comes_back(tmp_path):
    save_untrained(tmp_path, 512, asdict(CONFIG))
    model, max_context = load_model(tmp_path, torch.device("cpu"))
    assert model.config == CONFIG and max_context == 512 and not model.training
    for name, weight in untrained().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_a_model_of_an_older_version_is_refused_in_one_line(tmp_path):
    config = {name: value for name, value in asdict(CONFIG).items() if name != "features"}
    save_untrained(tmp_path, 512, config)
    with pytest.raises(UserError, match="lacks 'features': it was written by an older version") as error:
        load_model(tmp_path, torch.device("cpu"))
    assert "\n" not in str(error.value)
