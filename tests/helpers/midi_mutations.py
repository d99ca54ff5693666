"""Random damage of MIDI files: flipped bits, lost bytes, wrong lengths and more."""

import random
import re
from collections.abc import Iterator

_FOUND_BYTES = b"\x00\x7f\x80\x90\x99\xb0\xc0\xe0\xf0\xf1\xf3\xf4\xf7\xf8\xfe\xff"
_METAS = (
    b"\xff\x2f\x00",
    b"\xff\x51\x03\0\0\0",
    b"\xff\x51\x00",
    b"\xff\x58\x04\0\xff\0\0",
    b"\xff\x58\x02\x04\x02",
)
_LENGTHS = (0, 1, 5, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutants(base: bytes, count: int, seed: int, donor: bytes | None = None) -> Iterator[tuple[str, bytes]]:
    """`count` damaged copies of `base`, the same for the same arguments.

    Args:
        base: a MIDI file of at least 16 bytes.
        donor: the file from which splices take their second half; `base` itself if None.

    Yields:
        (kinds of damage, bytes). The first kind cycles through all; a quarter of the files get two more.
    """
    rng = random.Random(seed)
    kinds = list(_KINDS)
    for index in range(count):
        chosen = [kinds[index % len(kinds)]]
        if rng.random() < 0.25:
            chosen += rng.choices(kinds, k=2)
        damaged = bytearray(base)
        for kind in chosen:
            if len(damaged) >= 16:  # earlier damage may leave fewer bytes
                damaged = _KINDS[kind](damaged, rng, donor or base)
        yield "+".join(chosen), bytes(damaged)


def _flip_bits(data, rng, donor):
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _flip_header(data, rng, donor):
    data[rng.randrange(16)] ^= 1 << rng.randrange(8)
    return data


def _delete(data, rng, donor):
    start = rng.randrange(len(data))
    del data[start : start + _run(rng)]
    return data


def _insert(data, rng, donor):
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(_run(rng))
    return data


def _duplicate(data, rng, donor):
    start, target = rng.randrange(len(data)), rng.randrange(len(data) + 1)
    data[target:target] = data[start : start + _run(rng)]
    return data


def _overwrite(data, rng, donor):
    start = rng.randrange(len(data))
    run = _run(rng)
    data[start : start + run] = rng.choice((bytes(run), b"\xff" * run, b"\x80" * run, rng.randbytes(run)))
    return data


def _truncate(data, rng, donor):
    return data[: rng.randrange(len(data))]


def _lie_about_length(data, rng, donor):
    """Change the length field of a chunk."""
    chunks = [match.start() for match in re.finditer(b"MT(hd|rk)", data)]
    if chunks:
        start = rng.choice(chunks) + 4
        old = int.from_bytes(data[start : start + 4], "big")
        near = max(0, old + rng.randint(-20, 20))
        value = rng.choice((near, rng.getrandbits(32), rng.choice(_LENGTHS)))
        data[start : start + 4] = (value & 0xFFFFFFFF).to_bytes(4, "big")
    return data


def _put_status(data, rng, donor):
    for _ in range(rng.choice((1, 4))):
        data[rng.randrange(14, len(data))] = rng.choice(_FOUND_BYTES)
    return data


def _put_meta(data, rng, donor):
    """Write a meta event, well formed or not, over the bytes at a random place or between them."""
    event = rng.choice((*_METAS, bytes((0xFF, rng.randrange(256), rng.randrange(256)))))
    start = rng.randrange(14, len(data))
    data[start : start + rng.choice((0, len(event)))] = event
    return data


def _put_number(data, rng, donor):
    """A variable-length number with too many, or too high, digits."""
    start = rng.randrange(14, len(data))
    data[start : start + 1] = rng.choice((b"\xff\xff\xff\x7f", b"\xff" * 9 + b"\x7f", b"\x80" * 12 + b"\1"))
    return data


def _splice(data, rng, donor):
    """The start of one file and the end of another."""
    return data[: rng.randrange(len(data))] + donor[rng.randrange(len(donor)) :]


def _run(rng) -> int:
    return rng.choice((1, 1, 2, 3, 10, 100))


_KINDS = {
    "flip_bits": _flip_bits,
    "flip_header": _flip_header,
    "delete": _delete,
    "insert": _insert,
    "duplicate": _duplicate,
    "overwrite": _overwrite,
    "truncate": _truncate,
    "length": _lie_about_length,
    "status": _put_status,
    "meta": _put_meta,
    "number": _put_number,
    "splice": _splice,
}
