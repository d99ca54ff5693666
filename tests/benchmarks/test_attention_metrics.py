import pytest

from benchmarks.attention import metrics

from helpers.report_cases import SETTINGS, entry, row, song, triton


class TestFigures:
    def test_limit_and_speedup(self):
        assert metrics.limit_ms(song()) == pytest.approx(0.4)
        assert metrics.times_limit(song()) == pytest.approx(2.0)
        assert metrics.speedup(song(), "dense_flash") == pytest.approx(10)
        assert metrics.speedup(song(), "flex") == pytest.approx(50)
        assert metrics.summarize_share(song()) == pytest.approx(0.1)

    def test_rates(self):
        # 2e6 visible pairs x 8 heads x 64 channels x 2 products x 2 operations in 0.25 ms
        rate = metrics.tflops(song(), "triton", "forward", "useful", SETTINGS)
        assert rate == pytest.approx(2e6 * 8 * 64 * 2 * 2 / 0.25e-3 / 1e12)
        computed = metrics.tflops(song(), "triton", "backward", "computed", SETTINGS)
        assert computed == pytest.approx(4e6 * 8 * 64 * 5 * 2 / 0.55e-3 / 1e12)

    def test_what_was_not_measured_is_none(self):
        assert metrics.measured(song(), "flex_sorted") is None
        assert metrics.speedup(song(), "flex_sorted") is None
        without = row("x", 10, False, {"triton": triton(1, 1, 1)})
        assert metrics.limit_ms(without) is None and metrics.times_limit(without) is None
        assert metrics.summarize_share(song(), "flex") is None
        assert metrics.tflops(row("x", 10, False, {"flex": entry(1, 1)}), "flex", "forward", "computed",
                              SETTINGS) is None  # fmt: skip
