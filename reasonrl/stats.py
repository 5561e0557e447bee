"""Statistics of right and wrong answers: intervals, pass@k, the majority vote."""

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
