"""GPUs that are not there: Triton compiles for them whatever the code launches, and nothing runs.

A process that does not interpret kernels calls `compile_for` and then the code under test with tensors on the
CPU; `python -m helpers.fake_gpu JSON` is such a process. Triton needs no GPU to compile for one.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Bytes of shared memory that a program may use, and that an SM has; threads of an SM (CUDA C++ programming
# guide, technical specifications per compute capability).
KB = 1024
GPUS = {
    80: (163 * KB, 164 * KB, 2048),
    86: (99 * KB, 100 * KB, 1536),
    89: (99 * KB, 100 * KB, 1536),
    90: (227 * KB, 228 * KB, 2048),
    120: (99 * KB, 100 * KB, 1536),
}
TESTS = Path(__file__).resolve().parents[1]


def gpu_of(arch: int):
    """The `launch.Gpu` of an architecture."""
    from meloformer.kernels.launch import Gpu

    return Gpu("nvidia", (arch // 10, arch % 10), *GPUS[arch])


class FakeDriver:
    """Stands for Triton's driver of an NVIDIA GPU; `builds` are the kernels that it was given."""

    def __init__(self, arch: int, cache: Path, log: io.StringIO):
        from triton.backends.compiler import GPUTarget

        self.target, self.utils = GPUTarget("cuda", arch, 32), self
        self._cache, self._log = cache, log
        self.builds: list[dict] = []
        self.calls: list[tuple] = []

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device) -> int:
        return 7

    def get_current_target(self):
        return self.target

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": GPUS[self.target.arch][0]}  # a kernel that needs more is refused by Triton

    def load_binary(self, name: str, kernel: bytes, shared: int, device) -> tuple:
        log = self._log.getvalue()
        self._log.seek(0)
        self._log.truncate()
        ptx = max(self._cache.glob(f"*/{name}.ptx"), key=lambda path: path.stat().st_mtime_ns)
        found = {"kernel": name, "shared": shared, **resources(log), **emitted(ptx.read_text())}
        if (ttir := ptx.with_suffix(".ttir")).exists():  # kernels in Gluon have none
            found["ahead"] = loaded_ahead(ttir.read_text())
        self.builds.append(found)
        return "a module", name, 0, 0, 1024

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return lambda *arguments: self.calls.append(arguments)


def resources(log: str) -> dict:
    """What ptxas says of a kernel: registers of a thread, bytes that it spills, WGMMA one after the other."""
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "serialized": "wgmma.mma_async instructions are serialized" in log,
    }


def emitted(ptx: str) -> dict:
    """Instructions that matter for speed, by number."""
    kinds = {
        "cp_async": r"cp\.async\.c[ag]\.",
        "plain_loads": r"ld\.global\S*\.v4\.",
        "fma": r"fma\.rn\.(?:ftz\.)?f32",
        "wgmma": r"wgmma\.mma_async",
    }
    found = {name: len(re.findall(kind, ptx)) for name, kind in kinds.items()}
    found |= overlap_of(ptx) | arrivals_of(ptx)
    return found | {"threads": int(re.search(r"\.(?:req|max)ntid (\d+)", ptx)[1])}


def overlap_of(ptx: str) -> dict:
    """How often a kernel waits for the one before and lets the next one start, what stands in the text ahead
    of its first wait, and what it has written when it lets the next one start: `published`, stores that all
    threads of the program and then the whole GPU see before."""
    before, *after = ptx.split("griddepcontrol.wait")
    starts = "griddepcontrol.launch_dependents"
    told = re.findall(r"(?:st|atom|red)\.global|bar\.sync|fence\.acq_rel\.gpu", ptx.split(starts)[0])
    published = told[:-2].count("st.global") if told[-2:] == ["bar.sync", "fence.acq_rel.gpu"] else 0
    return {
        "published": published,
        "waits": len(after),
        "starts_next": ptx.count(starts),
        "starts_next_ahead": before.count(starts),
        "reads_ahead": before.count("ld.global"),
        "writes_ahead": len(re.findall(r"\b(?:st|atom|red)\.global", before)),
    }


def arrivals_of(ptx: str) -> dict:
    """Arrivals at barriers in memory, by one thread for its warp group; and those of them that no barrier of
    the group comes before, after all that reads or writes shared memory."""
    touches = r"ld\.shared|st\.shared|ldmatrix|stmatrix|wgmma\.mma_async|wgmma\.wait_group|cp\.async"
    steps = re.findall(rf"bar\.sync|mbarrier\.arrive|{touches}", ptx)
    arrivals = [before for before, step in zip([None, *steps], steps) if step == "mbarrier.arrive"]
    return {"arrivals": len(arrivals), "arrivals_alone": len(arrivals) - arrivals.count("bar.sync")}


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


def programs_at_once(build: dict, arch: int) -> int:
    """Of a kernel on one multiprocessor, by what it takes of it."""
    _, memory, threads = GPUS[arch]
    registers = -(-build["registers"] // 8) * 8 * build["threads"]
    return min(memory // (build["shared"] + KB), threads // build["threads"], 65_536 // registers)


def forget_launches() -> None:
    """What the launch cache knows, of whatever GPU."""
    from meloformer.kernels import lookup_kernels, norm_kernels, ops, rope_kernels, swiglu_kernels
    from meloformer.kernels.launch_cache import Launcher

    for module in (lookup_kernels, norm_kernels, ops, rope_kernels, swiglu_kernels):
        for launcher in vars(module).values():
            if isinstance(launcher, Launcher):
                launcher._known.clear()


@contextlib.contextmanager
def compile_for(arch: int) -> Iterator[FakeDriver]:
    """Whatever is launched inside is compiled for this architecture, anew, and not run."""
    from triton import knobs
    from triton.runtime import driver

    from meloformer.kernels import overlap

    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(log):
        fake = FakeDriver(arch, Path(cache), log)
        driver.set_active(fake)
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = cache, True
        forget_launches()
        overlap.can_overlap = lambda device: arch >= 90
        yield fake


def update(dtype: str, dim: int, kernels: Sequence[str]) -> None:
    """Launches kernels of the update phase, fields of `launch.Launches`."""
    import torch

    from meloformer.kernels import ops
    from meloformer.kernels.plan_work import NEEDS

    def draw(length: int) -> torch.Tensor:
        return torch.zeros(1, length, 8, dim, dtype=getattr(torch, dtype)).transpose(1, 2)

    n, m = 256, 64
    inputs = [draw(n), draw(m), draw(m), draw(n), draw(n)]
    shapes = (512,), (4096,), (64, 2, 64), (5, 16, 16), (NEEDS,)
    plan = [torch.zeros(shape, dtype=torch.int32) for shape in shapes]
    run = ops.Update(inputs, plan)
    o, lse = draw(n), torch.zeros(1, 8, n)
    stats = torch.zeros(1, 8, n, 2)
    for kernel in kernels:
        name, same_inst = kernel.split("_")[0], kernel.endswith("same_inst")
        if name == "forward":
            run.forward(o, lse, same_inst)
        elif name == "dq":
            run.query_gradient(draw(n), o, lse, draw(n), stats, same_inst)
        else:
            run.key_gradients([draw(m), draw(m), draw(n), draw(n)], draw(n), stats, same_inst)


def specialized(dtype: str, dim: int, kernels: Sequence[str] | None = None) -> None:
    """The kernels whose warps have different jobs, all or some of `launch.SPECIALIZED`."""
    from dataclasses import replace

    from meloformer.kernels.launch import SPECIALIZED, Launches, override

    with override(replace(Launches(), **SPECIALIZED)):
        update(dtype, dim, kernels or [*SPECIALIZED])


def specialized_forward(dtype: str, dim: int) -> None:
    specialized(dtype, dim, ["forward_same_inst"])


def summarize(dtype: str, dim: int) -> None:
    import torch

    from meloformer.kernels import ops

    def draw(length: int) -> torch.Tensor:
        return torch.zeros(1, length, 8, dim, dtype=getattr(torch, dtype)).transpose(1, 2)

    n, m = 256, 64
    inputs = [draw(m), draw(m), draw(m), draw(n), draw(n)]
    bars = torch.zeros(1, m, 4, dtype=torch.int32), torch.zeros(1, n, dtype=torch.int32)
    o, lse = ops.summarize(*inputs, *bars)
    ops.summarize_backward(*inputs, *bars, o, lse, draw(m))


def around(dtype: str, dim: int) -> None:
    """The kernels of a model beside attention, and those of a plan."""
    import torch

    from meloformer.kernels import lookup_kernels, norm_kernels, rope_kernels, swiglu_kernels
    from meloformer.kernels.lookup import PART, find_readers
    from meloformer.kernels.plan import Plan
    from meloformer.kernels.structure import Structure
    from meloformer.kernels.summarize import find_bars

    kind = getattr(torch, dtype)
    x = torch.zeros(1, 64, 512, dtype=kind)
    norm_kernels.forward([x], [x], torch.zeros(512), 1e-6)
    norm_kernels.backward(x[0], [x], [x], torch.zeros(512), 1e-6)
    swiglu_kernels.forward(x)
    swiglu_kernels.backward(x, x[..., :256])
    heads = [torch.zeros(1, 64, 512 // dim, dim, dtype=kind).transpose(1, 2) for _ in range(3)]
    tables = torch.zeros(1, 64, dim, dtype=kind)
    rope_kernels.split_backward(heads, heads[1:], tables, tables)
    rows = torch.zeros(9, 1, 64, dtype=torch.int64)
    lookup_kernels.forward(x[0], rows)
    lookup_kernels.backward(x, find_readers(rows, 64), PART, 64, torch.float32)
    facts = torch.zeros(5, 1, 128, dtype=torch.int64)
    structure = Structure.build(*facts, num_summaries=32)
    find_bars(structure)
    Plan(structure)


def compile_all(arch: int, dtype: str, dim: int, what: Sequence[str], by_rule: bool = False) -> list[dict]:
    """`what` are fields of `launch.Launches`, or of `OTHERS`; `by_rule`: launched as if this architecture had
    not been measured."""
    from meloformer.kernels.launch import launches_on, override, untuned

    itemsize = {"float16": 2, "bfloat16": 2, "float32": 4}[dtype]
    kernels = [name for name in what if name not in OTHERS]
    warnings.simplefilter("error")  # of the launch cache, if it gives way
    launches = (untuned if by_rule else launches_on)(gpu_of(arch), dim, itemsize)
    with compile_for(arch) as fake, override(launches):
        update(dtype, dim, kernels)
        for name in what:
            if name in OTHERS:
                OTHERS[name](dtype, dim)
    return fake.builds


OTHERS = {
    "summarize": summarize,
    "around": around,
    "specialized": specialized,
    "specialized_forward": specialized_forward,
}


def builds(*questions: tuple, fp_fusion: bool = True) -> list[list[dict]]:
    """What `compile_all` finds for each, in a process of their own, where kernels are not interpreted.

    Args:
        questions: the arguments of `compile_all`.
        fp_fusion: whether Triton fuses multiplications and additions unless it is told.
    """
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    environment["TRITON_DEFAULT_FP_FUSION"] = str(int(fp_fusion))
    done = subprocess.run(
        [sys.executable, "-m", "helpers.fake_gpu", json.dumps(questions)],
        capture_output=True, text=True, env=environment, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps([compile_all(*question) for question in json.loads(sys.argv[1])]))
