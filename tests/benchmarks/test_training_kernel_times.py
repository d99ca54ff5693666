"""Sums over kernels, without a GPU."""

import re
from pathlib import Path

import pytest

from benchmarks.training.kernel_times import KINDS, OTHERS, summed


def test_kernels_are_summed_by_name_and_kind_and_overlap_counts_once():
    ran = [
        ("forward_kernel", 0, 1000),
        ("nvjet_sm90_tst_256x128", 500, 2000),  # beside the first on another stream
        ("forward_kernel", 3000, 4000),
        ("swiglu_kernel", 3200, 3300),
        ("tiny", 5000, 5001),
    ]
    found = summed(reversed(ran), steps=2)
    assert found["busy_ms"] == pytest.approx((2000 + 1000 + 1) / 1e3 / 2)
    assert found["kinds"] == pytest.approx(
        {"attention, update": 1.0, "matrix products": 0.75, "SwiGLU": 0.05, OTHERS: 0.0005}
    )
    assert [name for name, *_ in found["kernels"]] == [
        "forward_kernel",
        "nvjet_sm90_tst_256x128",
        "swiglu_kernel",
    ]
    assert found["kernels"][0][1:] == pytest.approx([1, 1.0])


def test_nothing_ran():
    assert summed([], steps=1) == {"busy_ms": 0.0, "kinds": {}, "kernels": []}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused_add_mul_permute_17", "norms, RoPE, residuals"),
        ("triton_red_fused__log_softmax__to_copy_0", "loss"),
        ("triton_tem_fused_flex_attention_3", "attention, flex"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>", "attention, dense"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam", "optimizer"),
        ("summarize_gradient_kernel", "attention, summarize"),
        ("void cub::DeviceRadixSortOnesweepKernel<", "plan"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int", "matrix products"),
        ("Memcpy DtoD (Device -> Device)", OTHERS),
    ],
)
def test_what_kernels_are_for(name, kind):
    assert list(summed([(name, 0, 1)], 1)["kinds"]) == [kind]


def test_every_kernel_of_this_project_has_a_kind():
    """By the names of the kernels in the sources; those of decoding run in no training step."""
    files = (Path(__file__).resolve().parents[2] / "kernels").glob("*.py")
    sources = [file.read_text() for file in files if not file.name.startswith("decode")]
    names = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    assert len(names) > 10
    for name in names:
        (kind,) = summed([(name, 0, 1)], 1)["kinds"]
        assert kind in KINDS, name
