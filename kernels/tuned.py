"""Launches measured by `python -m benchmarks.tune --write`, which writes this file. See `launch.Entry`."""

ENTRIES = (
    {
        "vendor": "nvidia",
        "capability": (9, 0),
        "head_dim": 32,
        "itemsize": 2,
        "gpu": "NVIDIA H200",
        "date": "2026-11-29",
        "launches": {
            "forward_local": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=None),
            "forward_same_inst": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=None),
            "dq_local": dict(block_m=64, block_n=64, num_warps=4, num_stages=3, maxnreg=128),
            "dq_same_inst": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=128),
            "dkv_local": dict(block_m=64, block_n=64, num_warps=4, num_stages=3, maxnreg=168),
            "dkv_same_inst": dict(block_m=64, block_n=64, num_warps=4, num_stages=3, maxnreg=168),
        },
    },
    {
        "vendor": "nvidia",
        "capability": (9, 0),
        "head_dim": 64,
        "itemsize": 2,
        "gpu": "NVIDIA H200",
        "date": "2026-11-22",
        "launches": {
            "forward_local": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=128),
            "forward_same_inst": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=128),
            "dq_local": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=128),
            "dq_same_inst": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=128),
            "dkv_local": dict(block_m=64, block_n=64, num_warps=4, num_stages=3, maxnreg=None),
            "dkv_same_inst": dict(block_m=64, block_n=64, num_warps=4, num_stages=3, maxnreg=None),
        },
    },
    {
        "vendor": "nvidia",
        "capability": (9, 0),
        "head_dim": 128,
        "itemsize": 2,
        "gpu": "NVIDIA H200",
        "date": "2026-11-29",
        "launches": {
            "forward_local": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=None),
            "forward_same_inst": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=None),
            "dq_local": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=None),
            "dq_same_inst": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=None),
            "dkv_local": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=None),
            "dkv_same_inst": dict(block_m=64, block_n=64, num_warps=4, num_stages=2, maxnreg=None),
        },
    },
)
