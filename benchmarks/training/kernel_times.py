"""GPU time of training steps, by kernel and by the purpose of kernels."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch

# Purpose of a kernel: the first whose pattern matches its name.
KINDS = {
    "attention, update": r"^(hopper_)?(forward|query_gradient|key_gradient)_kernel$",
    "attention, summarize": r"^summarize(_gradient)?_kernel$",
    "plan": r"^(bars|encode|layout|candidates|look|count|fill|bits|work|share|pair)_kernel$|[Rr]adix[Ss]ort",
    "attention, dense": r"flash_|fmha|sdpa",
    "attention, flex": r"flex_attention",
    "matrix products": r"nvjet|gemm|cutlass|cublas",
    "SwiGLU": r"^swiglu",
    "loss": r"softmax|nll_loss",
    "norms, RoPE, residuals": r"^triton_|^(rms_norm|rms_norm_gradient|sum_rows|split_gradient)_kernel$",
    "embeddings": r"^lookup",
    "optimizer": r"multi_tensor_apply",
}
OTHERS = "others"
_ANNOTATIONS = ("Optimizer.", "ProfilerStep", "## ", "Torch-Compiled Region")
_LISTED_FROM = 0.005  # of all GPU time; kernels below it are not listed


def kernel_times(run: Callable[[int], object], steps: int, device: torch.device) -> dict:
    """Profiles `run(steps)`.

    Returns:
        JSON values, in milliseconds per step: `wall_ms`, wall time with the profiler active; `busy_ms`, in
        which at least one kernel ran; `kinds`, by `KINDS`; `kernels`, [name, calls per step, ms] each, the
        longest first.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        begun = time.perf_counter()
        run(steps)
        torch.cuda.synchronize(device)
        wall = time.perf_counter() - begun
    ran = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(_ANNOTATIONS)
    ]
    return {"wall_ms": wall * 1e3 / steps} | summed(ran, steps)


def summed(ran: Iterable[tuple[str, float, float]], steps: int) -> dict:
    """The sums of `kernel_times`, from (name, start, end) in microseconds of every kernel that ran."""
    spent, calls, kinds = Counter(), Counter(), Counter()
    busy, until = 0.0, float("-inf")
    for name, start, end in sorted(ran, key=lambda kernel: kernel[1]):
        spent[name] += (end - start) / 1e3 / steps
        calls[name] += 1 / steps
        kinds[_kind(name)] += (end - start) / 1e3 / steps
        busy += max(0.0, end - max(start, until)) / 1e3 / steps
        until = max(until, end)
    least = _LISTED_FROM * sum(spent.values())
    return {
        "busy_ms": busy,
        "kinds": dict(kinds.most_common()),
        "kernels": [[name, calls[name], ms] for name, ms in spent.most_common() if ms >= least],
    }


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHERS)
