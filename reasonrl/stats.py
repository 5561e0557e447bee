"""Statistics of answers: intervals, pass@k, the majority vote; lengths against what was asked."""

from __future__ import annotations

import collections
import math

import numpy as np

Z95 = 1.959963984540054  # standard normal quantile of .975


def wilson(p: float, n: int) -> tuple[float, float]:
  """95 % score interval of a proportion p out of n (Wilson 1927); not empty at 0 or 1."""
  centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
  half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
  return max(0.0, centre - half), min(1.0, centre + half)


def clustered(values) -> tuple[float, float]:
  """95 % interval of the mean of per-problem values in [0, 1]: mean +- 1.96 sd / sqrt(problems).

  Samples of one problem are not independent, so problems are what is counted. Where the values do
  not differ, or are 0 and 1 alone, it is Wilson's.
  """
  values = np.asarray(values, np.float64)
  mean, spread = float(values.mean()), values.std(ddof=1) if values.size > 1 else 0.0
  if spread == 0 or np.isin(values, (0.0, 1.0)).all():
    return wilson(mean, values.size)
  half = Z95 * float(spread) / math.sqrt(values.size)
  return max(0.0, mean - half), min(1.0, mean + half)


def pass_at_k(n: int, c, k: int) -> np.ndarray:
  """Unbiased chance that of k of n samples, c of them right, one is right (arXiv 2107.03374 eq. 1).

      1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1}^{n} (1 - k / i)

  Args:
    n: samples of each problem.
    c: int [P], how many of them are right.
    k: at most n.
  """
  i = np.arange(1, n + 1)
  factors = np.where(i > n - np.asarray(c)[:, None], 1 - k / i, 1.0)
  return 1 - np.maximum(factors, 0.0).prod(1)  # fewer than k wrong ones: some factor is <= 0


def majority(votes, right) -> float:
  """1 if the largest group of equal votes is right, else 0 (self-consistency, arXiv 2203.11171).

  A tie goes to the group whose first member comes first; 0 is no vote.
  """
  counts = collections.Counter(vote for vote in votes if vote)
  if not counts:
    return 0.0
  winner = counts.most_common(1)[0][0]  # of equal counts the one first met
  return float(right[list(votes).index(winner)])


def majorities(votes, right, k: int) -> float:
  """Mean of `majority` over the blocks of k consecutive samples; what is left over is not used."""
  starts = range(0, len(votes) - k + 1, k)
  return float(np.mean([majority(votes[i : i + k], right[i : i + k]) for i in starts]))


def paired_gain(before, after) -> tuple[float, float, float]:
  """Mean difference of per-problem results and its 95 % interval: mean +- 1.96 sd / sqrt(n).

  Pairing removes the spread between easy and hard problems, which both runs share.
  """
  gain = np.asarray(after, np.float64) - np.asarray(before, np.float64)
  half = Z95 * gain.std(ddof=1) / math.sqrt(gain.size)
  return float(gain.mean()), float(gain.mean() - half), float(gain.mean() + half)


def control(lengths, low, high) -> float:
  """Share of lengths inside their bounds: 1/|A| sum_a 1[low <= a <= high] (arXiv 2501.19393).

  There a is the mean thinking tokens of a run at one setting; of single responses it is the share
  that keeps to its budget.

  Args:
    lengths: [A].
    low: a bound for all, or [A]; -inf = none.
    high: as `low`; inf = none.
  """
  lengths = np.asarray(lengths, np.float64)
  return float(np.mean((low <= lengths) & (lengths <= high)))


def scaling(lengths, accuracies) -> float:
  """Mean slope of accuracy over all pairs of runs (arXiv 2501.19393): per token.

      mean over a < b of (f(b) - f(a)) / (b - a)

  Published numbers state no unit; 1e5 times this is percentage points per 1,000 tokens. Pairs of
  equal length have no slope; NaN if there is no other.

  Args:
    lengths: [A], mean thinking tokens of each run.
    accuracies: [A], f of it.
  """
  lengths, accuracies = np.asarray(lengths, np.float64), np.asarray(accuracies, np.float64)
  first, second = np.triu_indices(lengths.size, 1)
  run, rise = lengths[second] - lengths[first], accuracies[second] - accuracies[first]
  slopes = rise[run != 0] / run[run != 0]
  return float(slopes.mean()) if slopes.size else math.nan


def performance(accuracies) -> float:
  """The best accuracy of the runs (arXiv 2501.19393)."""
  return float(np.max(accuracies))


def length_errors(lengths, targets) -> dict[str, float]:
  """Relative errors e = (n - n_gold) / n_gold of response lengths (arXiv 2503.04697).

      mean_error mean e    mean_abs_error mean |e|    rms_error sqrt(mean e^2)

  The paper prints the first without its sign, for one target at a time; signs cancel in it.

  Args:
    lengths: [R].
    targets: one for all, or [R].
  """
  error = (np.asarray(lengths, np.float64) - targets) / targets
  return {
    'mean_error': float(error.mean()),
    'mean_abs_error': float(np.abs(error).mean()),
    'rms_error': float(np.sqrt((error**2).mean())),
  }


def violations(lengths, targets, slack: float) -> dict[str, float]:
  """Shares of responses further than `slack` tokens from their target (arXiv 2503.04697: 500).

  'one_sided' counts n - n_gold > slack, all that can violate a maximum; 'two_sided' is what the
  paper prints, |n - n_gold| > slack. Arguments as in `length_errors`.
  """
  over = np.asarray(lengths, np.float64) - targets
  two_sided = np.abs(over) > slack
  return {'one_sided': float((over > slack).mean()), 'two_sided': float(two_sided.mean())}
