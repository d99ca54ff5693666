"""The lists of keys that tokens read against the visibility rule, written out over whole songs."""

import numpy as np
import pytest
import torch

from meloformer.generation.visible import VisibleKeys
from meloformer.kernels import Structure
from meloformer.kernels.structure import KIND_RULES, regular_sees
from meloformer.model.token_reader import TokenReader
from meloformer.tokens import attributes


def visible_by_rule(ids: np.ndarray, near_bars, kind_rule) -> tuple[np.ndarray, np.ndarray]:
    """bool [n, bars] summaries, bool [n, n] tokens."""
    scanned = attributes.scan(ids)
    facts = (torch.from_numpy(x)[None] for x in (scanned.bar, scanned.inst, scanned.kind, scanned.onset))
    structure = Structure.build(torch.zeros(1, len(ids), dtype=torch.int32), *facts)
    keys = structure.keys.at(slice(None), None)
    mask = regular_sees(structure.tokens.at(slice(None), slice(None), None), keys, near_bars, kind_rule)[0]
    bars = structure.summary_bar.shape[1]
    return mask[:, :bars].numpy(), mask[:, bars:].numpy()


@pytest.mark.parametrize("near_bars", [(0, 1), (0, 1, 2, 4), (2,)], ids=str)
@pytest.mark.parametrize("kind_rule", KIND_RULES)
def test_a_token_reads_what_it_sees_and_nothing_else(songs, near_bars, kind_rule):
    for ids in songs[2:6]:
        ids = ids[:1500]
        summaries, tokens = visible_by_rule(ids, near_bars, kind_rule)
        reader, visible = TokenReader(), VisibleKeys(near_bars, kind_rule)
        in_blocks = VisibleKeys(near_bars, kind_rule)
        lists = [np.empty(len(ids) + summaries.shape[1], dtype=np.int64) for _ in range(visible.lists)]
        for position, token in enumerate(ids.tolist()):
            facts = reader.push(token)
            keys = visible.keys_of(facts)
            keys_list = lists[keys.number]
            if keys.begins:
                bars = np.flatnonzero(summaries[position])
                assert keys.start == len(bars)
                keys_list[: keys.start] = -1 - bars
            keys_list[keys.start : keys.start + len(keys.tokens)] = keys.tokens
            keys_list[keys.place] = position
            seen = np.sort(keys_list[: keys.place + 1])
            expected = [-1 - np.flatnonzero(summaries[position])[::-1], np.flatnonzero(tokens[position])]
            np.testing.assert_array_equal(seen, np.concatenate(expected), f"token {position}")
            if position % 7:
                in_blocks.push(facts)
            else:
                np.testing.assert_array_equal(in_blocks.seen_by(facts), expected[1], f"token {position}")


@pytest.mark.parametrize("kind_rule", KIND_RULES)
def test_most_keys_are_collected_once_in_a_group(songs, kind_rule):
    """What is copied into the lists is a small part of what is read from them."""
    ids = max(songs, key=len)
    reader, visible = TokenReader(), VisibleKeys((0, 1), kind_rule)
    lists = [visible.keys_of(reader.push(token)) for token in ids.tolist()]
    copied, read = sum(len(keys.tokens) for keys in lists), sum(keys.place + 1 for keys in lists)
    assert copied < read / 4, (copied, read)


def test_the_tokens_of_a_bar_lie_side_by_side(songs):
    reader, visible = TokenReader(), VisibleKeys((0, 1), "any")
    bars = attributes.scan(songs[0]).bar
    for position, token in enumerate(songs[0].tolist()):
        visible.push(reader.push(token))
        bar = visible.bar_of(int(bars[position]))
        assert bar == slice(int(np.argmax(bars == bars[position])), position + 1)
