"""How the kernels are launched: by the table, or safely on GPUs that nobody measured."""

import pytest
import torch

from meloformer.kernels import launch_cache as launcher
from meloformer.kernels import tuning
from meloformer.kernels.launch import Entry, Launch, Launches, safe
from meloformer.kernels.tuned import TABLE

KILOBYTE = 1024
KERNELS = ("forward_near", "forward_far", "dq_near", "dq_far", "dkv_near", "dkv_far")


@pytest.mark.parametrize("shared", [64, 99, 163, 227], ids=lambda kilobytes: f"{kilobytes}_KB")
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_safe_launches_fit_shared_memory(dim, itemsize, shared):
    launches = safe(dim, itemsize, shared * KILOBYTE)
    for name in KERNELS:
        launch = getattr(launches, name)
        resident = 1 if name.startswith("forward") else 2
        operands = resident * launch.rows + 2 * launch.stages * launch.columns
        assert operands * dim * itemsize < shared * KILOBYTE


def test_more_shared_memory_gives_deeper_pipelines():
    small, large = (safe(128, 2, kilobytes * KILOBYTE).dq_near for kilobytes in (99, 227))
    assert (small.rows, small.stages) != (large.rows, large.stages)
    assert small.rows * small.stages < large.rows * large.stages


@pytest.mark.parametrize(
    ("wrong", "message"), [({"rows": 48}, "rows of a line"), ({"columns": 16}, "columns at a time")]
)
def test_sizes_that_no_kernel_takes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Launch(**wrong)


def test_entries_say_where_they_come_from():
    assert TABLE
    keys = [(entry.capability, entry.head_dim, entry.itemsize) for entry in TABLE]
    assert len(set(keys)) == len(keys)
    assert all(entry.gpu and len(entry.date) == 10 for entry in TABLE)


class FakeProperties:
    major, minor, shared_memory_per_block_optin = 9, 0, 227 * KILOBYTE


def test_the_table_is_asked_first(monkeypatch):
    entry = Entry((9, 0), 64, 2, Launches.all(Launch(32, 32)), "a GPU", "2026-01-01")
    monkeypatch.setattr(tuning, "TABLE", (entry,))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeProperties)
    tuning._chosen.cache_clear()
    device = torch.device("cuda:0")
    assert tuning.launches_for(device, torch.bfloat16, 64) is entry.launches
    assert tuning.launches_for(device, torch.float16, 64) is entry.launches
    assert tuning.launches_for(device, torch.float32, 64) == safe(64, 4, 227 * KILOBYTE)
    with tuning.override(Launches()):
        assert tuning.launches_for(device, torch.bfloat16, 64) == Launches()
    tuning._chosen.cache_clear()


class FakeCompiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.calls = []

    def run(self, *arguments):
        self.calls.append(arguments)


class FakeKernel:
    """Stands for a compiled kernel of a tensor, a number and the constant N."""

    def __init__(self):
        self.compiled, self.launches = FakeCompiled(), []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append((grid, arguments, constants))
            return self.compiled

        return launch


class TestLauncher:
    @pytest.fixture
    def kernel(self, monkeypatch):
        monkeypatch.setattr(launcher, "_current_stream", lambda device: 7)
        return FakeKernel()

    def launcher(self, kernel):
        made = launcher.Launcher(kernel)
        made._constants = frozenset({"N"})
        return made

    def test_a_launch_seen_before_passes_addresses(self, kernel):
        launch, x = self.launcher(kernel), torch.zeros(64)
        for _ in range(3):
            launch((5,), (x,), (2, 0.5), N=16, num_warps=4)
        assert len(kernel.launches) == 1
        expected = (5, 1, 1, 7, "function", "metadata", None, None, None, x.data_ptr(), 2, 0.5, 16)
        assert kernel.compiled.calls == [expected] * 2

    @pytest.mark.parametrize("what", ["number", "constant", "option", "dtype"])
    def test_another_launch_is_left_to_triton(self, kernel, what):
        launch, x = self.launcher(kernel), torch.zeros(64)
        launch((5,), (x,), (2,), N=16, num_warps=4)
        other = x.half() if what == "dtype" else x
        constants = {"N": 32 if what == "constant" else 16, "num_warps": 8 if what == "option" else 4}
        launch((5,), (other,), (3 if what == "number" else 2,), **constants)
        assert len(kernel.launches) == 2 and not kernel.compiled.calls

    def test_unaligned_pointers_are_left_to_triton(self, kernel):
        launch, x = self.launcher(kernel), torch.zeros(64)
        launch((5,), (x,), (2,), N=16)
        launch((5,), (x[1:],), (2,), N=16)
        assert len(kernel.launches) == 2 and not kernel.compiled.calls

    def test_memory_is_bounded(self, kernel, monkeypatch):
        monkeypatch.setattr(launcher, "_MOST_KNOWN", 4)
        launch, x = self.launcher(kernel), torch.zeros(64)
        for number in range(20):
            launch((5,), (x,), (number,), N=16)
        assert len(launch._known) <= 4
