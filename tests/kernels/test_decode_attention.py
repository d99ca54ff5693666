"""Attention of a decoding step to lists of very different lengths, shared out among programs."""

import pytest
import torch

pytest.importorskip("triton")

from meloformer.kernels import decode

HEADS, DIM, ROOM = 4, 32, 300
COUNTS = [0, 1, 280, 16, 17, 0, 63, 150, 2]  # places that each song sees


def rows_and_keys(counts: list[int], device: str, dtype=torch.float32) -> tuple[decode.Rows, torch.Tensor]:
    """With random queries, lists in random order, and keys that nobody must read where no list has them."""
    generator = torch.Generator().manual_seed(0)
    rows = decode.Rows(len(counts), HEADS, DIM, 8, ROOM, 0, torch.float32, torch.device(device))
    keys = torch.randn((2, len(counts), rows.places, HEADS, DIM), generator=generator)
    rows._q.copy_(torch.randn(rows._q.shape, generator=generator) * 3)
    for song, count in enumerate(counts):
        order = 1 + torch.randperm(ROOM - 1, generator=generator)
        rows.list[song, :count] = order[:count].int()
        keys[:, song, order[count:]] = torch.nan
    rows.count.copy_(torch.tensor(counts))
    return rows, keys.to(device, dtype)


def attended(rows: decode.Rows, keys: torch.Tensor) -> torch.Tensor:
    """[S, H * D] in float64; 0 for songs that see nothing."""
    out = torch.zeros(rows._q.shape, dtype=torch.float64, device=keys.device)
    for song, count in enumerate(rows.count.tolist()):
        if count:
            q = rows._q[song].view(HEADS, 1, DIM).double()
            k, v = keys[:, song, rows.list[song, :count].long()].double().transpose(1, 2)
            out[song] = (torch.softmax(q @ k.transpose(1, 2) * DIM**-0.5, 2) @ v).flatten()
    return out


@pytest.mark.parametrize(("shares", "heads", "begins"), [(1, 4, 1), (3, 2, 0), (16, 4, 2), (60, 2, 1)])
def test_equal_shares_of_all_lists(shares, heads, begins, monkeypatch):
    """Songs that a program has wholly, that several have, more than are joined at once, beginnings alone, and
    idle programs."""
    for name, value in {"_EACH": shares * HEADS // heads, "_MOST_HEADS": heads, "_JOINED": 2}.items():
        monkeypatch.setattr(decode, name, value)
    monkeypatch.setattr(decode, "_MANY_TILE", 4 * 16 * heads * DIM)  # 16 places: 40 tiles in all
    monkeypatch.setattr(decode, "_MANY_BEGINS", begins)
    rows, keys = rows_and_keys(COUNTS, "cpu")
    _attends(rows, keys)


def _attends(rows: decode.Rows, keys: torch.Tensor, more: float = 0) -> None:
    rows._attended.fill_(torch.nan)
    for _ in range(2):  # counters are as before
        rows._attend_lists(keys)
    torch.testing.assert_close(rows._attended.double(), attended(rows, keys), rtol=1e-5, atol=1e-5 + more)


@pytest.mark.parametrize("songs", [len(COUNTS), 3], ids="{} songs".format)
def test_keys_of_8_bits_are_read_exactly(songs, monkeypatch):
    monkeypatch.setattr(decode, "_EACH", 3)
    monkeypatch.setattr(decode, "_PROGRAMS", 24)
    _attends(*rows_and_keys(COUNTS[-songs:], "cpu", torch.float8_e4m3fn))


@pytest.mark.parametrize("own", ["first", "last", "not listed"])
@pytest.mark.parametrize(("parts", "lines"), [(2, 64), (4, 4), (8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_lists_longer_than_the_first_blocks_of_all_parts(dtype, parts, lines, own, monkeypatch):
    """With the place that the kernel before has just written in the first block of a part, or behind it."""
    monkeypatch.setattr(decode, "_PROGRAMS", parts * 3 * HEADS)
    monkeypatch.setattr(decode, "_TILE", 16 * DIM * dtype.itemsize)  # 16 places
    monkeypatch.setattr(decode, "_LINES", lines)
    rows, keys = rows_and_keys([63, 280, 2], "cpu", dtype)
    assert rows._splits == parts
    for song, count in enumerate(rows.count.tolist()):
        if own != "not listed":
            rows.place[song] = rows.list[song, 0 if own == "first" else count - 1]
    _attends(rows, keys)


@pytest.mark.parametrize(("shares", "heads"), [(3, 1), (3, 2), (3, 4), (60, 4)])
def test_tensor_cores_attend_to_keys_of_8_bits(shares, heads, monkeypatch):
    """Queries of 16 bits: all is exact, up to float32, but that weights are rounded to float16."""
    values = {"_EACH": shares * HEADS // heads, "_MOST_HEADS": heads, "_MANY_WARPS": 2}
    for name, value in values.items():
        monkeypatch.setattr(decode, name, value)
    monkeypatch.setattr(decode, "_DOT_TILE", 32 * heads * DIM)  # 32 places
    rows, keys = rows_and_keys(COUNTS, "cpu", torch.float8_e4m3fn)
    rows._q = rows._q.bfloat16()
    _attends(rows, keys, 2**-12 * keys.float().nan_to_num().abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_compiled_shares_give_the_same_bits_each_time(dtype, q_dtype):
    rows, keys = rows_and_keys([0, 1, 299, 16, 17, 250] * 8, "cuda", dtype)
    rows._q = rows._q.to(q_dtype)
    dots = dtype.itemsize == 1 and q_dtype.itemsize == 2
    atol = 1e-5 + dots * 2**-12 * keys.float().nan_to_num().abs().max().item()  # weights are float16
    found = []
    for _ in range(20):
        rows._attended.fill_(torch.nan)
        rows._attend_lists(keys)
        found.append(rows._attended.clone())
    torch.testing.assert_close(found[0].double(), attended(rows, keys), rtol=1e-5, atol=atol)
    assert all(torch.equal(one, found[0]) for one in found)
