"""Where the GPU's time goes in steps of training: by kernel, and by what kernels are for."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch

# What a kernel is for: the first whose pattern is found in its name.
KINDS = {
    "attention, update": r"^(forward|query_gradient|key_gradient)_kernel$",
    "attention, summarize": r"^(summarize|summary_gradient|token_gradient)_kernel$",
    "plan": r"^(bars|encode|layout|candidates|look|count|fill|bits|work)_kernel$|[Rr]adix[Ss]ort",
    "attention, dense": r"flash_|fmha|sdpa",
    "attention, flex": r"flex_attention",
    "matrix products": r"nvjet|gemm|cutlass|cublas",
    "SwiGLU": r"^swiglu",
    "loss": r"softmax|nll_loss",
    "norms, RoPE, residuals": r"^triton_|^(rms_norm|rms_norm_gradient|sum_rows|unsplit)_kernel$",
    "optimizer": r"multi_tensor_apply",
}
OTHERS = "others"
_ANNOTATIONS = ("Optimizer.", "ProfilerStep", "## ", "Torch-Compiled Region")
_LEAST_SHARE = 0.005  # of the time: kernels below are not named one by one


def kernel_times(run: Callable[[int], object], steps: int, device: torch.device) -> dict:
    """Profiles `run(steps)`. Milliseconds per step, as JSON values:

    wall_ms: by the clock, with the profiler at work. busy_ms: in which some kernel ran. kinds: by those of
    `KINDS`. kernels: [name, calls per step, ms], the longest first.
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
    """The sums of `kernel_times` over kernels that ran: name, start and end in microseconds."""
    spent, calls, kinds = Counter(), Counter(), Counter()
    busy, until = 0.0, float("-inf")
    for name, start, end in sorted(ran, key=lambda kernel: kernel[1]):
        spent[name] += (end - start) / 1e3 / steps
        calls[name] += 1 / steps
        kinds[_kind(name)] += (end - start) / 1e3 / steps
        busy += max(0.0, end - max(start, until)) / 1e3 / steps
        until = max(until, end)
    least = _LEAST_SHARE * sum(spent.values())
    return {
        "busy_ms": busy,
        "kinds": dict(kinds.most_common()),
        "kernels": [[name, calls[name], ms] for name, ms in spent.most_common() if ms >= least],
    }


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHERS)
