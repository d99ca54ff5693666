"""How the kernels are launched: by the table, or safely on GPUs that nobody measured."""

import dataclasses
from threading import Event, Thread

import pytest
import torch

from meloformer.kernels import launch, launch_cache
from meloformer.kernels.launch import TABLE, Entry, Launch, Launches, untuned

from helpers.fake_gpu import GPUS, gpu_of

KILOBYTE = 1024
KERNELS = ("forward_local", "forward_same_inst", "dq_local", "dq_same_inst", "dkv_local", "dkv_same_inst")


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_untuned_launches_fit_shared_memory(dim, itemsize, arch):
    launches = untuned(gpu_of(arch), dim, itemsize)
    for name in KERNELS:
        one = getattr(launches, name)
        resident = 1 if name.startswith("forward") else 2
        operands = resident * one.block_m + 2 * one.num_stages * one.block_n
        assert operands * dim * itemsize < GPUS[arch][0]


def test_untuned_launches_by_hand():
    """What the compiler needs is tested in test_builds; here, what follows of that."""
    desktop, server, hopper = (untuned(gpu_of(arch), 64, 2) for arch in (86, 80, 90))
    # Tiles of 8 KB: q and a stage of k and v are 24 KB, of which 100 KB hold 3; do makes it 32 KB, or 2.
    assert desktop.forward_local == Launch(64, 64, num_warps=4, num_stages=2, maxnreg=168)
    assert desktop.dq_local == desktop.dkv_local == Launch(64, 64, num_warps=4, num_stages=2)
    # 164 KB hold more than 65,536 registers do, of which 3 programs of 128 threads take 168 each.
    assert server.dq_same_inst == Launch(64, 64, num_warps=4, num_stages=2, maxnreg=168)
    assert server.dkv_same_inst.maxnreg is None
    assert hopper.forward_local.maxnreg == 168
    assert untuned(gpu_of(90), 128, 2).dkv_local.num_warps == 8
    assert untuned(gpu_of(90), 64, 4) == Launches.all(Launch(64, 64, num_warps=16, num_stages=1))


def test_little_shared_memory_gives_small_tiles():
    tiny = dataclasses.replace(gpu_of(86), program_memory=48 * KILOBYTE)
    assert untuned(tiny, 128, 2).dq_local.block_m == 32
    assert untuned(tiny, 128, 4).dq_local.block_m == 16


@pytest.mark.parametrize(
    ("wrong", "message"), [({"block_m": 48}, "block_m must be"), ({"block_n": 16}, "block_n must be")]
)
def test_sizes_that_no_kernel_takes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Launch(**wrong)


def test_entries_say_where_they_come_from():
    assert TABLE
    keys = [(entry.vendor, entry.capability, entry.head_dim, entry.itemsize) for entry in TABLE]
    assert len(set(keys)) == len(keys)
    assert all(entry.gpu and len(entry.date) == 10 for entry in TABLE)


class FakeProperties:
    major, minor, shared_memory_per_block_optin = 9, 0, 227 * KILOBYTE
    shared_memory_per_multiprocessor, max_threads_per_multi_processor = 228 * KILOBYTE, 2048
    regs_per_multiprocessor, multi_processor_count = 65_536, 132


def test_the_table_is_asked_first(monkeypatch):
    entry = Entry("nvidia", (9, 0), 64, 2, Launches.all(Launch(32, 32)), "a GPU", "2026-01-01")
    monkeypatch.setattr(launch, "TABLE", (entry,))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeProperties)
    monkeypatch.setattr(launch, "version", lambda name: "3.7.1")  # whichever is installed
    launch._chosen.cache_clear()
    device = torch.device("cuda:0")
    special = {name: launch.SPECIALIZED[name] for name in launch.FASTER}
    many, few = 3 * 132 + 1, 3 * 132
    specialized = dataclasses.replace(entry.launches, **special)
    assert special and launch.launches_for(device, torch.bfloat16, 64, many) == specialized
    assert launch.launches_for(device, torch.float16, 64, many) == specialized
    assert launch.launches_for(device, torch.bfloat16, 64, few) == entry.launches
    assert launch.launches_for(device, torch.float32, 64, many) == untuned(gpu_of(90), 64, 4)
    with launch.override(Launches()):
        assert launch.launches_for(device, torch.bfloat16, 64, many) == Launches()
    launch._chosen.cache_clear()


def test_a_gpu_of_amd_takes_no_launch_of_hopper(monkeypatch):
    """gfx90a calls itself 9.0; registers cannot be limited there."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeProperties)
    for version, capped in ((None, True), ("6.4", False)):
        monkeypatch.setattr(torch.version, "hip", version)
        gpu = launch.Gpu.of(torch.device("cuda:0"))
        assert gpu.capability == (9, 0)
        found = launch.launches_on(gpu, 64, 2)
        assert any(getattr(found, name).maxnreg for name in KERNELS) is capped


class FakeCompiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.calls = []
        self._run = lambda *arguments: self.calls.append(arguments)

    @property
    def run(self):
        return self._run


class FakeKernel:
    """Stands for a kernel of a tensor, numbers and the constant N, and for how Triton calls it."""

    def __init__(self):
        self.compiled, self.launches = FakeCompiled(), []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append((grid, arguments, constants))
            self.compiled.run(*self.call(grid, arguments, constants["N"]))
            return self.compiled

        return launch

    def call(self, grid, arguments, n):
        run = (*grid, 1, 1)[:3]
        return *run, 7, "function", "metadata", "for a profiler", "before", "after", *arguments, n


CALLS = {
    "constants left out": lambda call: call[:-1],
    "another order": lambda call: (*call[:9], *reversed(call[9:])),
    "an argument more": lambda call: (*call[:6], None, *call[6:]),
    "as many arguments, another stream": lambda call: (*call[:3], 8, *call[4:]),
}


class TestLauncher:
    @pytest.fixture
    def kernel(self, monkeypatch):
        monkeypatch.setattr(launch_cache, "current_stream", lambda device: 7)
        launch_cache._warn_of_another_call.cache_clear()
        return FakeKernel()

    def launcher(self, kernel, compared=True):
        made = launch_cache.Launcher(kernel)
        made._constants = frozenset({"N"})
        made._trusted = True if compared else made._trusted
        return made

    def test_a_launch_seen_before_passes_addresses(self, kernel):
        launch, x = self.launcher(kernel), torch.zeros(64)
        for _ in range(3):
            launch((5,), (x,), ((4, 8), 0.5), N=16, num_warps=4)
        assert len(kernel.launches) == 1
        expected = (5, 1, 1, 7, "function", "metadata", None, None, None, x.data_ptr(), (4, 8), 0.5, 16)
        assert kernel.compiled.calls[1:] == [expected] * 2

    @pytest.mark.parametrize("what", ["number", "constant", "option", "dtype"])
    def test_another_launch_is_left_to_triton(self, kernel, what):
        launch, x = self.launcher(kernel), torch.zeros(64)
        launch((5,), (x,), (2,), N=16, num_warps=4)
        other = x.half() if what == "dtype" else x
        constants = {"N": 32 if what == "constant" else 16, "num_warps": 8 if what == "option" else 4}
        launch((5,), (other,), (3 if what == "number" else 2,), **constants)
        assert len(kernel.launches) == 2

    def test_unaligned_pointers_are_left_to_triton(self, kernel):
        launch, x = self.launcher(kernel), torch.zeros(64)
        launch((5,), (x,), (2,), N=16)
        launch((5,), (x[1:],), (2,), N=16)
        assert len(kernel.launches) == 2

    def test_memory_is_bounded(self, kernel, monkeypatch):
        monkeypatch.setattr(launch_cache, "_MAX_KNOWN", 4)
        launch, x = self.launcher(kernel), torch.zeros(64)
        for number in range(20):
            launch((5,), (x,), (number,), N=16)
        assert len(launch._known) <= 4

    def test_the_first_launch_is_compared_with_tritons_and_runs_once(self, kernel, recwarn):
        launch, x = self.launcher(kernel, compared=False), torch.zeros(64)
        for _ in range(3):
            launch((5, 2), (x,), ((4, 8), 0.5), N=16, num_warps=4)
        assert len(kernel.launches) == 2  # the second was only recorded
        assert len(kernel.compiled.calls) == 3 and not recwarn.list
        own, *ours = kernel.compiled.calls
        assert all(call[:6] == own[:6] and call[9:] == (x.data_ptr(), *own[10:]) for call in ours)

    @pytest.mark.parametrize("how", CALLS)
    def test_it_gives_way_if_triton_calls_otherwise(self, kernel, how):
        usual = kernel.call
        kernel.call = lambda *arguments: CALLS[how](usual(*arguments))
        launch, x = self.launcher(kernel, compared=False), torch.zeros(64)
        with pytest.warns(UserWarning, match=r"Triton [0-9.]+ calls its kernels in a way unknown"):
            launch((5,), (x,), (2, 3), N=16)
        for _ in range(3):
            launch((5,), (x,), (2, 3), N=16)
        assert len(kernel.launches) == 1 + 1 + 3
        assert all(call[6:9] != (None, None, None) for call in kernel.compiled.calls)
        assert len(kernel.compiled.calls) == 1 + 3

    def test_it_gives_way_if_triton_cannot_be_listened_to(self, kernel):
        class Compiled(FakeCompiled):
            def __init__(self):
                self.calls = []

            def run(self, *arguments):
                self.calls.append(arguments)

        kernel.compiled = Compiled()
        launch, x = self.launcher(kernel, compared=False), torch.zeros(64)
        with pytest.warns(UserWarning, match="unknown here"):
            launch((5,), (x,), (2,), N=16)
        launch((5,), (x,), (2,), N=16)
        assert len(kernel.launches) == len(kernel.compiled.calls) == 2

    def test_it_gives_way_if_triton_has_renamed_what_is_private(self, kernel, monkeypatch):
        monkeypatch.delattr(FakeCompiled, "packed_metadata")
        launch, x = self.launcher(kernel, compared=False), torch.zeros(64)
        with pytest.warns(UserWarning, match="unknown here"):
            launch((5,), (x,), (2,), N=16)
        launch((5,), (x,), (2,), N=16)
        assert len(kernel.launches) == len(kernel.compiled.calls) == 2

    def test_what_another_thread_launches_meanwhile_is_run(self, kernel):
        def launch():
            other = Thread(target=lambda: kernel.compiled.run("of the other"))
            other.start()
            other.join()
            kernel.compiled.run("compared")

        assert launch_cache._passed_by_triton(kernel.compiled, launch) == ["compared"]
        assert kernel.compiled.calls == [("of the other",)]

    def test_two_threads_that_compare_at_once_leave_the_kernel_as_it_was(self, kernel):
        compiled, first_is_done = kernel.compiled, Event()
        own = compiled.run

        def launch_of_second():
            first_is_done.wait(60)
            compiled.run("second")

        def compare_second():
            found.append(launch_cache._passed_by_triton(compiled, launch_of_second))

        def launch_of_first():
            second.start()
            second.join(0.1)  # it has got as far as it can
            compiled.run("first")

        found, second = [], Thread(target=compare_second)
        found.append(launch_cache._passed_by_triton(compiled, launch_of_first))
        first_is_done.set()
        second.join()
        assert compiled.run is own and not compiled.calls
        assert found == [["first"], ["second"]]

    def test_amd_is_left_to_triton(self, kernel, monkeypatch):
        monkeypatch.setattr(launch_cache, "_ON_AMD", True)
        launch, x = self.launcher(kernel, compared=False), torch.zeros(64)
        for _ in range(3):
            launch((5,), (x,), (2,), N=16)
        assert len(kernel.launches) == 3
