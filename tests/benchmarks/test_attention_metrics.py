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

    def test_the_best_dense_attention_of_one_song_and_of_several(self):
        alone = song()
        alone["columns"] |= {"documents_cudnn": entry(0.1, 0.1)}
        assert metrics.best_dense(alone) == "dense_cudnn"
        several = song() | {"documents": 3}
        assert metrics.best_dense(several) is None  # they must not see each other
        assert metrics.speedup(several, metrics.best_dense(several)) is None
        several["columns"] |= {"documents_cudnn": entry(0.6, 1.2), "documents_flash": entry(0.5, 1.1)}
        assert metrics.best_dense(several) == "documents_flash"
        assert metrics.speedup(several, "documents_flash") == pytest.approx(2.0)
        assert metrics.speedup(several, "documents_flash", summarize=True) == pytest.approx(1.6 / 0.88)
        batch = song() | {"documents": 4, "rows": 4}  # a document each
        assert metrics.best_dense(batch) == "dense_cudnn"

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
