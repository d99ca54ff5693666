import torch

from benchmarks.common.compile_counts import count_compilations


def test_graphs_are_counted():
    torch._dynamo.reset()
    twice = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    with count_compilations() as compiled:
        twice(torch.ones(2))
        twice(torch.ones(2))
        assert compiled() == {"graphs": 1, "kernels": 0}
        twice(torch.ones(2))
        assert compiled() == {"graphs": 0, "kernels": 0}
        twice(torch.ones(3))
        assert compiled() == {"graphs": 1, "kernels": 0}
