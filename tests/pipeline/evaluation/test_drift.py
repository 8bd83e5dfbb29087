"""Whether a champion has fallen: the interval of a drop between two independent samples."""

import numpy as np
import pytest

from pipeline.evaluation.drift import drop_between


def bootstrap(values: np.ndarray, seed: int) -> dict[str, float]:
    means = np.random.default_rng(seed).choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"score": float(values.mean()), "low": float(low), "high": float(high)}


def test_interval_of_a_drop_is_that_of_two_bootstraps_drawn_at_once() -> None:
    draw = np.random.default_rng(0)
    recorded, now = draw.gamma(4.0, 10.0, 200), draw.gamma(3.0, 10.0, 80)
    found = drop_between(bootstrap(recorded, 1), bootstrap(now, 2), "higher")
    both = draw.choice(recorded, (4000, 200)).mean(axis=1) - draw.choice(now, (4000, 80)).mean(axis=1)
    low, high = np.quantile(both, [0.025, 0.975])
    assert found.drop == pytest.approx(recorded.mean() - now.mean(), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.6)


def test_equal_samples_show_a_fall_in_about_one_of_forty() -> None:
    draw = np.random.default_rng(3)

    def falls(shift: float) -> int:
        pairs = ((draw.normal(40, 8, 60), draw.normal(40 - shift, 8, 60)) for _ in range(100))
        return sum(drop_between(bootstrap(a, 1), bootstrap(b, 2), "higher").low > 0 for a, b in pairs)

    assert falls(0.0) <= 8 and falls(10.0) >= 97


def test_of_a_metric_that_is_better_when_lower_a_rise_is_the_drop() -> None:
    recorded, now = {"score": 10.0, "low": 7.0, "high": 12.0}, {"score": 20.0, "low": 16.0, "high": 25.0}
    found = drop_between(recorded, now, "lower")
    assert (found.drop, found.low, found.high) == pytest.approx((10.0, 10 - 20**0.5, 10 + 34**0.5), abs=1e-5)
