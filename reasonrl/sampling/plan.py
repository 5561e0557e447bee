"""Which requests a program serves, on which device, with which prompts: host arrays of few shapes.

Requests are sorted by prompt and dealt out in equal stretches, so a device needs few prompts. What
is missing to a shape is filled with requests for 0 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from reasonrl import sharding, types


class Arrays(NamedTuple):
  """What a program is given: for each device of this process a stretch of P or R."""

  tokens_PT: np.ndarray
  length_P: np.ndarray
  prompt_R: np.ndarray  # among the prompts of the same device
  key_R: np.ndarray
  max_new_R: np.ndarray
  numbers: dict[str, np.ndarray]
  temperature_R: np.ndarray | None


class Wave(NamedTuple):
  """One run of a program."""

  arrays: Arrays
  request: np.ndarray  # int [R]: which request each is, the number of all = none
  rows: int  # of each device
  width: int  # requests, one after the other, that share the cache of a prompt
  ordered: bool  # whether each of these groups has the next prompt, if they are all rows


def _power_of_two(n: int) -> int:
  """The least power of two that is at least n."""
  return 1 << max(n - 1, 0).bit_length()


def _few_sizes(n: int) -> int:
  """At least n, of eight numbers from a power of two to the next."""
  step = max(1, _power_of_two(n) // 16)
  return -(-n // step) * step


def waves(
  requests: types.Requests, slots: int, devices: int, longest: int, window: int
) -> Iterator[Wave]:
  """All requests in turn; the same number of waves, of the same shapes, on every process.

  Args:
    slots: rows of this process that serve them; 0: as many as there are requests.
    devices: of this process, that rows are split over.
    longest, window: tokens of a prompt and of a row, of all processes.
  """
  R = requests.prompt_R.size
  most = sharding.agree(R)
  order = np.argsort(requests.prompt_R, kind='stable')
  at_once = not slots or most <= slots
  # Rows that share a prompt are replaced together, when the last of them has stopped. That is worth
  # it if there is more to read of a prompt than of what follows.
  width = _width(requests, most, devices) if at_once or 2 * longest >= window else 1

  def per_device(count: int) -> int:
    """Requests: what there are, or one of few numbers, but not more rows than asked for."""
    groups, room = -(-count // (width * devices)), slots // (width * devices)
    if not slots:
      return width * groups
    if not at_once:
      return width * _few_sizes(groups)
    return width * max(groups, min(_power_of_two(groups), room))

  rows = per_device(most) if at_once else width * -(-slots // (width * devices))
  # The prompts of a program take no more memory than its rows.
  prompts = devices * max(rows, rows * window // longest)
  _, first = np.unique(requests.prompt_R[order], return_index=True)
  for i in range(sharding.agree(-(-first.size // prompts))):
    ends = [*first[i * prompts : (i + 1) * prompts + 1 : prompts], R][:2]
    some = order[ends[0] : ends[1]] if i * prompts < first.size else order[:0]
    yield _wave(
      requests, some, devices, longest, per_device(sharding.agree(some.size)), rows, width
    )


def _width(requests: types.Requests, most: int, devices: int) -> int:
  """Requests that share a prompt: of the divisors of all counts, what leaves the fewest rows idle.

  Of several the largest.
  """
  counts = np.unique(requests.prompt_R, return_counts=True)[1].tolist()
  common = math.gcd(*(math.gcd(*counts) for counts in sharding.gather(counts)))
  divisors = [w for w in range(1, common + 1) if common % w == 0]
  rows = {w: -(-most // (w * devices)) * w for w in divisors}
  return max(divisors, key=lambda w: (-rows[w], w)) if divisors else 1


def _wave(requests, order, devices: int, longest: int, per: int, rows: int, width: int) -> Wave:
  """The requests of `order`, `per` of them on each device."""
  count = order.size

  def deal(x, fill=0):
    """[devices, per, ...]: x of each request."""
    out = np.full((devices * per, *x.shape[1:]), fill, x.dtype)
    out[:count] = x[order]
    return out.reshape(devices, per, *x.shape[1:])

  real = np.arange(devices * per).reshape(devices, per) < count
  prompt = deal(requests.prompt_R)
  used = [np.unique(row[mask]) for row, mask in zip(prompt, real, strict=True)]
  place = np.stack([np.searchsorted(u, p) for u, p in zip(used, prompt, strict=True)])
  P = min(per // width, _few_sizes(sharding.agree(max(u.size for u in used))))
  tokens = np.zeros((devices, P, longest), np.int32)
  length = np.ones((devices, P), np.int32)
  for d, u in enumerate(used):
    tokens[d, : u.size, : requests.tokens_PT.shape[1]] = requests.tokens_PT[u]
    length[d, : u.size] = requests.length_P[u]
  groups = np.broadcast_to(np.arange(per // width), place[:, ::width].shape)
  mixed = np.any((place[:, ::width] != groups) & real[:, ::width]) or P < per // width
  arrays = Arrays(
    tokens_PT=tokens,
    length_P=length,
    prompt_R=np.where(real, place, 0).astype(np.int32),
    key_R=deal(requests.key_R),
    max_new_R=deal(requests.max_new_R),
    numbers={name: deal(x) for name, x in requests.numbers.items()},
    temperature_R=None if requests.temperature_R is None else deal(requests.temperature_R, 1),
  )
  arrays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
  request = np.where(real, deal(np.arange(requests.prompt_R.size)), requests.prompt_R.size)
  ordered = rows < per or sharding.agree(int(mixed)) == 0
  return Wave(arrays, request.reshape(-1), min(rows, per), width, ordered)
