"""What the kernels of a decoding step take, as PyTorch's profiler sees them in the replays of a graph."""

from collections.abc import Callable, Iterable

import torch


def of_steps(events: Iterable[tuple[str, int, float]], once: str) -> list[dict[str, float | str]]:
    """By kernel: launches and microseconds a step, the longest first.

    Args:
        events: name, launches and microseconds of each kernel over some steps.
        once: part of the name of the kernel that each step launches once.

    Raises:
        ValueError: there is no such kernel.
    """
    events = list(events)
    steps = sum(launches for name, launches, _ in events if once in name)
    if not steps:
        raise ValueError(f"no kernel is called {once}")
    rows = [{"kernel": name, "launches": launches / steps, "us": us / steps} for name, launches, us in events]
    return sorted(rows, key=lambda row: -row["us"])


def profiled(run: Callable[[], None], once: str) -> list[dict[str, float | str]]:
    """`of_steps` of what runs on the GPU meanwhile."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    averages = profile.key_averages()
    return of_steps(((event.key, event.count, event.self_device_time_total) for event in averages), once)
