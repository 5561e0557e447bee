"""Lengths against what was asked, by hand. Intervals, pass@k and votes: see test_evaluation.py."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrl import stats

LENGTHS, ACCURACIES = [1000, 2000, 4000], [0.30, 0.40, 0.45]


def test_control_scaling_performance_by_hand():
  # Slopes 1e-4, 5e-5 (1000 to 4000) and 2.5e-5.
  assert stats.scaling(LENGTHS, ACCURACIES) == pytest.approx(5.8333e-5, rel=1e-4)
  assert stats.performance(ACCURACIES) == 0.45
  assert stats.control(LENGTHS, -math.inf, 2500) == pytest.approx(2 / 3)
  assert stats.control(LENGTHS, 1500, math.inf) == pytest.approx(2 / 3)
  assert stats.control(LENGTHS, 1000, 2000) == pytest.approx(2 / 3)  # bounds count as inside
  # A bound for each run: the paper's table of class-conditional control.
  assert stats.control([8033, 9651], [-math.inf, 6109], [6109, math.inf]) == 0.5


def test_scaling_skips_runs_of_equal_length():
  assert stats.scaling([1000, 1000, 2000], [0.1, 0.3, 0.4]) == pytest.approx(2e-4)
  assert math.isnan(stats.scaling([1000, 1000], [0.1, 0.3]))
  assert math.isnan(stats.scaling([1000], [0.1]))


@given(st.permutations(range(3)), st.floats(0.1, 10))
def test_scaling_is_a_slope_of_a_set(order, factor):
  lengths = [LENGTHS[i] * factor for i in order]
  found = stats.scaling(lengths, [ACCURACIES[i] for i in order])
  assert found * factor == pytest.approx(stats.scaling(LENGTHS, ACCURACIES))


def test_length_errors_by_hand():
  both = stats.length_errors([90, 110], 100)
  assert both == pytest.approx({'mean_error': 0, 'mean_abs_error': 0.1, 'rms_error': 0.1})
  each = stats.length_errors([150, 200, 90], [100, 200, 100])
  want = {'mean_error': 0.4 / 3, 'mean_abs_error': 0.2, 'rms_error': math.sqrt(0.26 / 3)}
  assert each == pytest.approx(want)


def test_violations_by_hand():
  lengths = np.asarray([400, 500, 1500, 1501])
  assert stats.violations(lengths, 1000, 500) == {'one_sided': 0.25, 'two_sided': 0.5}
  assert stats.violations([7, 8], [8, 7], 0) == {'one_sided': 0.5, 'two_sided': 1.0}
