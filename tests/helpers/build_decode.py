"""Builds the kernels of a decoding step for an H100 that need not be there, as the step would launch them.

Run as a program, in a process in which Triton is not told to interpret. It prints a line of JSON for each
kernel. Arguments: numbers of slots, separated by commas, a dtype, and that of the caches if it is another.
"""

import contextlib
import io
import json
import sys
from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from meloformer.generation.device.fused_step import FusedStep
from meloformer.kernels import launch_cache, overlap
from meloformer.model.transformer import SIZES, MeloFormer

from helpers.fake_gpu import loaded_ahead, overlap_of, resources

NAMES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


def build(self, programs, tensors, numbers, **constants) -> None:
    """In place of `Launcher.__call__`."""
    kernel = self._kernel
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    names = kernel.arg_names
    # In another order the launch cache would leave the kernel to Triton, whose launches cost the host more.
    assert [name for name in names if name in constants] == [*constants], kernel.__name__
    given = dict(zip(names, [*tensors, *numbers])) | constants
    signature, fixed, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in constants or value == 1:  # as launches have it
            signature[name], fixed[(index,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, fixed, attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    found = {"kernel": kernel.__name__, "shared": built.metadata.shared, "cp_async": ptx.count("cp.async.c")}
    found |= {"ahead": loaded_ahead(built.asm["ttir"]), **resources(log.getvalue())}
    found |= {"float8": ptx.count("e4m3x2"), "transposed": ptx.count("x4.trans.shared"), **overlap_of(ptx)}
    print(json.dumps(found | {"mma": ptx.count("mma.sync"), "wgmma": ptx.count("wgmma")}), flush=True)


def build_step(slots: int, dtype: torch.dtype, cache_dtype: torch.dtype | None = None) -> None:
    """Of a model with layers of the base size; launches build, and compute nothing."""
    config = replace(SIZES["base"], layers=1)
    step = FusedStep(
        MeloFormer(config).to(dtype).eval(), slots, 256, 16, "reference", cache_dtype=cache_dtype
    )
    step()


if __name__ == "__main__":
    launch_cache.Launcher.__call__ = build
    overlap.can_overlap = lambda device: True
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    for number in sys.argv[1].split(","):
        build_step(int(number), *(getattr(torch, name) for name in sys.argv[2:]))
