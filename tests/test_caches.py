"""What a row's slots hold, and moving it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl import caches

B, K, S, C, N = 3, 2, 6, 4, 2
POSITIONS = np.asarray([[2, -1, 0, 1, -1, 3], [-1, -1, -1, -1, -1, -1], [5, 4, 3, 2, 1, 0]])


def filled(scanned=False, dtype='float32'):
  """A cache of random values."""
  rng = np.random.default_rng(0)
  cache = caches.empty(N, scanned, B, K, S, C, dtype)
  random = lambda x: jnp.asarray(rng.integers(-99, 99, x.shape), x.dtype)
  own = jax.tree.map(random, cache.own)
  return dataclasses.replace(cache, own=own, position_BS=jnp.asarray(POSITIONS, jnp.int32))


KINDS = [(False, 'float32'), (True, 'float32'), (False, 'bfloat16'), (True, 'int8')]


@pytest.mark.parametrize(('scanned', 'dtype'), KINDS)
def test_tidy_rows(scanned, dtype):
  """Tokens come first, in order, with their keys, values and scales."""
  old = filled(scanned, dtype)
  new = jax.jit(caches.tidy)(old)
  assert new.position_BS.tolist() == [[0, 1, 2, 3, -1, -1], [-1] * 6, [0, 1, 2, 3, 4, 5]]
  for before, after in zip(jax.tree.leaves(old.own), jax.tree.leaves(new.own), strict=True):
    if after.shape[-2] == 1:  # scales: slots are the last axis
      before, after = before.swapaxes(-1, -2), after.swapaxes(-1, -2)
    first = jnp.take(before[..., 0, :, :, :], jnp.asarray([2, 3, 0, 5]), axis=-2)
    np.testing.assert_array_equal(after[..., 0, :, :4, :], first)
    np.testing.assert_array_equal(after[..., 2, :, :, :], before[..., 2, :, ::-1, :])


@pytest.mark.parametrize(('scanned', 'dtype'), KINDS)
def test_rows_move_one_by_one_as_at_once(scanned, dtype):
  old = filled(scanned, dtype)
  order = jnp.argsort(jax.random.uniform(jax.random.key(0), (B, S)), axis=1)
  at_once = jax.jit(caches.move_at_once)(old.own, order)
  one_by_one = jax.jit(caches.move_one_by_one)(old.own, order)
  jax.tree.map(np.testing.assert_array_equal, at_once, one_by_one)


def test_what_tokens_see():
  """Two new tokens in slots 1 and 2; the second row has one, and no slot before."""
  cache = dataclasses.replace(filled(), slot=jnp.int32(1))
  positions = jnp.asarray([[4, 5], [0, 1], [6, 7]], jnp.int32)
  segments = jnp.asarray([[1, 1], [1, 0], [0, 0]], jnp.int32)
  position = jnp.asarray(
    [[2, 4, 5, 1, -1, 3], [-1, 0, -1, -1, -1, -1], [5, -1, -1, 2, 1, 0]], jnp.int32
  )
  noted = caches.note(dataclasses.replace(cache, position_BS=position), positions, segments)
  assert noted.position_BS.tolist() == position.tolist()
  new, own, shared = caches.visible(noted, positions, segments, None)
  assert shared is None
  assert new.astype(int).tolist() == [[[1, 0], [1, 1]], [[1, 0], [1, 0]], [[0, 0], [0, 0]]]
  assert own[0].astype(int).tolist() == [[1, 0, 0, 1, 0, 1]] * 2
  assert not own[1].any()
  assert own[2].astype(int).tolist() == [[1, 0, 0, 1, 1, 1]] * 2
  new, own, _ = caches.visible(noted, positions, segments, 2)  # a window of two tokens
  assert new[0].astype(int).tolist() == [[1, 0], [1, 1]]
  assert own[0].astype(int).tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]
