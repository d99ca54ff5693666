"""Models from checkpoints."""

from dataclasses import asdict

import pytest
import torch

from meloformer.checkpoint.store import save_checkpoint
from meloformer.errors import UserError
from meloformer.generation.load import load_model
from meloformer.tokens import vocab

from helpers.untrained import CONFIG, untrained


def save(folder, config):
    save_checkpoint(
        folder,
        1,
        model_state=untrained().state_dict(),
        config=config,
        tokenizer_json=vocab.to_json(),
        optimizer_state=None,
        trainer={"identity": {"max_seq_len": 512}},
        keep_last=1,
    )


def test_a_model_comes_back(tmp_path):
    save(tmp_path, asdict(CONFIG))
    model, max_context = load_model(tmp_path, torch.device("cpu"))
    assert model.config == CONFIG and max_context == 512 and not model.training
    for name, weight in untrained().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_a_model_of_an_older_version_is_refused_in_one_line(tmp_path):
    config = {name: value for name, value in asdict(CONFIG).items() if name != "features"}
    save(tmp_path, config)
    with pytest.raises(UserError, match="lacks 'features': it was written by an older version") as error:
        load_model(tmp_path, torch.device("cpu"))
    assert "\n" not in str(error.value)
