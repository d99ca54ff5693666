"""Made-up results of benchmarks.report with round figures, and functions that read the pages made of them."""

import re
from copy import deepcopy
from pathlib import Path

from benchmarks.common.results_file import save

MACHINE = {
    "date": "2026-01-02",
    "commit": "abc",
    "python": "3.11.0",
    "packages": {"torch": "2.11.0"},
    "processor": "CPU",
    "gpu": "Test GPU",
    "cuda": "13.0",
}
SETTINGS = {"heads": 8, "dim": 64, "dtype": "bfloat16"}


def times(ms: float, spread: float = 0.1, repeats: int = 30) -> dict:
    return {
        "ms": ms,
        "p20": ms * (1 - spread),
        "p80": ms * (1 + spread),
        "host_ms": 0.25,
        "wall_ms": ms + 0.5,
        "repeats": repeats,
    }


def entry(forward: float, backward: float, computed: int | None = None, **more) -> dict:
    """A measured column."""
    phase = {"forward": times(forward), "backward": times(backward), "extra_mb": 12.5}
    found = {"dtype": "bfloat16", "first_call_s": 3.0, "errors": {"update o": 0.5, "update dq": 0.75}}
    if computed is not None:
        found["computed_pairs"] = computed
    return found | {"update": phase} | more


def triton(forward: float, backward: float, computed: int) -> dict:
    """A measured column whose summarize takes a tenth of update."""
    summarize = {"forward": times(forward / 10), "backward": times(backward / 10), "extra_mb": 0.5}
    plan = {"plan": times(0.5), "plan_bytes": 4_000_000, "full_pairs": computed // 2}
    return entry(forward, backward, computed, summarize=summarize, **plan)


def row(name: str, tokens: int, packed: bool, columns: dict) -> dict:
    """A row of the report; a tenth of its causal pairs is visible."""
    causal = tokens * 1000
    return {
        "name": name,
        "packed": packed,
        "documents": 1,
        "tokens": tokens,
        "summaries": 128,
        "visible_pairs": causal // 10,
        "causal_pairs": causal,
        "columns": columns,
        "seconds": 2.0,
    }


def result(*rows: dict, **more) -> dict:
    return deepcopy({"format": 1, "machine": MACHINE, "settings": SETTINGS, "rows": list(rows)} | more)


def song() -> dict:
    """A row where cuDNN takes 1 + 3 ms, so that the limit is 0.4 ms, and Triton takes 0.8 ms."""
    columns = {
        "triton": triton(0.25, 0.55, 4_000_000),
        "dense_cudnn": entry(1.0, 3.0, 20_000_000),
        "dense_flash": entry(2.0, 6.0, 20_000_000),
        "flex": entry(16.0, 24.0, 21_000_000, plan=times(3.0)),
        "flex_sorted": {"failed": "OutOfMemoryError: CUDA | out of memory"},
        "flex_fp32": {"skipped": "slow, so not measured beyond 16,384 tokens"},
    }
    return row("A | song", 20_000, False, columns)


def packed(tokens: int) -> dict:
    n = tokens / 10_000
    columns = {
        "triton": triton(0.1 * n, 0.2 * n, int(tokens * 200)),
        "dense_cudnn": entry(0.4 * n * n, 1.1 * n * n, tokens * 1000),
    }
    return row(f"packed to {tokens:,}", tokens, True, columns)


def written(folder: Path, *results: dict) -> list[Path]:
    """Write these results to files 0.json, 1.json, ...; returns the paths."""
    paths = [folder / f"{i}.json" for i in range(len(results))]
    for path, content in zip(paths, results):
        save(content, path)
    return paths


def table_rows(text: str, heading: str) -> list[str]:
    """The rows of the table under a heading of a page, without the header row."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def table_cells(text: str, heading: str) -> list[list[str]]:
    """The cells of each of these rows."""
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in table_rows(text, heading)]
