"""What became of an edge: every class by hand, at its borders, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mansu_interp.circuits.changes import CLASSES, MEANING, classify
from mansu_interp.errors import CircuitError

# before, after, quantized -> class, with threshold 0.1
CASES = [
    (1.0, 1.0, 1.0, "kept"),
    (1.0, 0.5, 0.0, "kept"),  # exactly half; what quantization does to a kept edge is no class
    (1.0, 3.0, 3.0, "kept"),
    (-1.0, -0.8, -0.8, "kept"),  # an opposing edge that still opposes
    (1.0, 0.0, 0.0, "silent"),
    (1.0, 0.2499, 0.2499, "silent"),
    (1.0, -0.2499, 0.0, "silent"),
    (1.0, 0.25, 0.25, "weakened"),  # exactly a quarter
    (1.0, 0.4999, 0.4999, "weakened"),
    (1.0, -1.0, -1.0, "weakened"),  # reversed: still flows, against the answer
    (-1.0, 0.6, 0.6, "weakened"),
    (1.0, 0.0, 0.5, "recovered"),
    (1.0, 0.4, 0.9, "recovered"),
    (1.0, -0.9, 1.0, "recovered"),
    (-1.0, 0.0, -0.5, "recovered"),
    (1.0, 0.0, -1.0, "silent"),  # the wrong sign brings nothing back
    (1.0, 0.0, 0.4999, "silent"),
    (0.0, 0.1, 0.0, "new"),
    (0.0999, 0.0, -0.1, "new"),
    (0.0, 0.0, 0.0, "quiet"),
    (0.0999, 0.0999, 0.0999, "quiet"),
    (0.1, 0.0, 0.0, "silent"),  # exactly at the threshold: present
]


@pytest.mark.parametrize(("before", "after", "quantized", "name"), CASES)
def test_each_class_by_hand(before: float, after: float, quantized: float, name: str):
    found = classify(np.array([before]), np.array([after]), np.array([quantized]), threshold=0.1)
    assert found.names().tolist() == [name]


def test_matrices_counts_and_default_threshold():
    b, a, q = (np.array([[row[k] for row in CASES]] * 2) for k in range(3))
    found = classify(b, a, q, threshold=0.1)
    assert found.codes.shape == b.shape
    wanted = {n: 2 * sum(row[3] == n for row in CASES) for n in CLASSES[1:]}
    assert found.counts() == wanted and set(wanted) == set(MEANING)
    assert classify(np.array([2.0, -5.0]), np.zeros(2)).threshold == pytest.approx(0.05)


def test_without_a_quantized_model_nothing_is_recovered():
    b, a = np.array([1.0, 1.0]), np.array([0.0, 0.9])
    assert classify(b, a).names().tolist() == ["silent", "kept"]


def test_all_zero_and_zero_threshold_are_quiet():
    zero = np.zeros(3)
    assert classify(zero, zero, zero).names().tolist() == ["quiet"] * 3
    assert classify(zero, zero, threshold=0.0).counts()["new"] == 0


def test_a_common_scale_changes_nothing():
    rng = np.random.default_rng(0)
    b, a, q = rng.normal(size=(3, 200))
    assert (classify(b, a, q).codes == classify(7 * b, 7 * a, 7 * q).codes).all()
    assert (classify(b, a, q).codes == classify(-b, -a, -q).codes).all()


@pytest.mark.parametrize(
    ("after", "threshold", "message"),
    [
        (np.zeros(3), 0.1, r"must have one shape; got \(2,\), \(3,\) and \(3,\)"),
        (np.array([0.0, np.nan]), 0.1, "not finite"),
        (np.zeros(2), -1.0, "must not be negative; got -1.0"),
    ],
)
def test_refused(after: np.ndarray, threshold: float, message: str):
    with pytest.raises(CircuitError, match=message):
        classify(np.zeros(2), after, threshold=threshold)
