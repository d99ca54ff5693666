"""Builds the kernels of a decoding step for an H100 that need not be there, as the step would launch them.

Run as a program, in a process in which Triton is not told to interpret. It prints a line of JSON for each
kernel. Arguments: numbers of slots, separated by commas, a dtype, and that of the caches if it is another.
"""

import contextlib
import io
import json
import re
import sys
from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from meloformer.generation.device.fused_step import FusedStep
from meloformer.kernels import launch_cache, overlap
from meloformer.model.transformer import SIZES, MeloFormer

from helpers.fake_gpu import overlap_of, resources

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


def loaded_ahead(ttir: str) -> dict[str, list[str]]:
    """By tensor, an argument of the kernel, that is loaded ahead of the first wait: from which others it
    depends what of it is loaded, by addresses and masks."""
    operands: dict[str, list[str]] = {}

    def arguments(names: list[str], seen: set[str]) -> set[str]:
        found: set[str] = set()
        for name in set(names) - seen:
            seen.add(name)
            if name in operands:
                found |= arguments(operands[name], seen)
            elif name.endswith("_ptr"):
                found.add(name[1:])
        return found

    def tensor(name: str) -> str:  # the pointer is the first operand of whatever computes an address
        while name in operands:
            name = operands[name][0]
        return name[1:]

    loaded: dict[str, set[str]] = {}
    for line in ttir.split("griddepcontrol.wait")[0].splitlines():
        if found := re.match(r"\s*(%\w+)(?::\d+)? = (.*?)(?: loc\(|$)", line):
            name, operation = found.groups()
            names = re.findall(r"%\w+", operation)
            if operation.startswith("tt.load"):
                of = tensor(names[0])
                loaded.setdefault(of, set()).update(arguments(names, set()) - {of})
            if names:
                operands[name] = names
    return {name: sorted(others) for name, others in sorted(loaded.items())}


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
    triton.knobs.nvidia.dump_ptxas_log = True
    for number in sys.argv[1].split(","):
        build_step(int(number), *(getattr(torch, name) for name in sys.argv[2:]))
