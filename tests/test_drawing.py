"""One draw: inverse CDF, the kept sets of top-k, top-p and min-p, log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from reasonrl import drawing, sharding, types

V = 24


def spec(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  return types.Spec(temperature, top_k, top_p, min_p, 0, (V,), ())


inverse_cdf = jax.jit(drawing.inverse_cdf)


def draw(z_BV, u_B, how):
  """Token, log-probability and weights."""
  drawn = drawing.draw(z_BV, z_BV, u_B, how)
  return drawn.token_B, drawn.logp_B, drawn.weight_BV


@pytest.mark.parametrize(
  'weights, u, token',
  [
    ((1, 2, 0, 1), 0.0, 0),
    ((1, 2, 0, 1), 0.2499, 0),
    ((1, 2, 0, 1), 0.25, 1),
    ((1, 2, 0, 1), 0.7499, 1),
    ((1, 2, 0, 1), 0.75, 3),  # not 2, which has no weight
    ((0, 0, 3, 0), 0.0, 2),
    ((0, 0, 3, 0), 1 - 2**-24, 2),
    ((1e-30, 0, 0, 0), 1 - 2**-24, 0),
    ((5, 0, 0, 0), 0.5, 0),
  ],
)
def test_inverse_cdf_by_hand(weights, u, token):
  got = inverse_cdf(jnp.asarray([weights], jnp.float32), jnp.asarray([u], jnp.float32))
  assert got.dtype == jnp.int32 and got.item() == token


def test_a_weight_that_is_not_a_number_still_gives_an_id():
  assert inverse_cdf(jnp.full((1, V), jnp.nan), jnp.asarray([0.5])).item() in range(V)


def test_inverse_cdf_across_blocks():
  weights = np.zeros((1, 3 * drawing.BLOCK - 7), np.float32)
  weights[0, [3, drawing.BLOCK, 2 * drawing.BLOCK + 5]] = 1.0, 2.0, 1.0
  u = np.asarray([0.0, 0.24, 0.25, 0.74, 0.75, 1 - 2**-24], np.float32)
  got = inverse_cdf(jnp.repeat(weights, 6, axis=0), u)
  want = [3, 3, drawing.BLOCK, drawing.BLOCK, 2 * drawing.BLOCK + 5, 2 * drawing.BLOCK + 5]
  assert got.tolist() == want


def test_inverse_cdf_frequencies():
  """n evenly spaced uniforms give every token its share of n, to within one."""
  n, rng = 20_000, np.random.default_rng(0)
  weights = (rng.random(700) * (rng.random(700) < 0.3)).astype(np.float32)
  u = ((np.arange(n) + 0.5) / n).astype(np.float32)
  many = jax.jit(jax.vmap(lambda w, u: drawing.inverse_cdf(w[None], u[None])[0], (None, 0)))
  counts = np.bincount(many(weights, u), minlength=700)
  assert np.abs(counts - n * weights / weights.sum(dtype=np.float64)).max() < 1.1
  assert not counts[weights == 0].any()


@pytest.mark.parametrize('size, share', [(2 * drawing.BLOCK, 0.5), (5000, 0.05)])
def test_inverse_cdf_never_takes_a_token_of_weight_zero(size, share):
  """Uniforms at the boundaries, where rounding puts the goal on either side."""
  rng, rows = np.random.default_rng(0), np.arange(64)
  weights = rng.random((64, size), np.float32) * (rng.random((64, size)) < share)
  cdf = np.asarray(jnp.cumsum(weights, axis=1))
  for _ in range(100):
    u = cdf[rows, rng.integers(0, size, 64)] / cdf[:, -1]
    tokens = inverse_cdf(weights, np.clip(u, 0, 1 - 2**-24).astype(np.float32))
    assert (weights[rows, tokens] > 0).all()


def test_a_cdf_that_rises_at_a_weight_of_zero():
  weights, cdf = jnp.asarray([[1.0, 0.0, 1.0, 0.0]] * 4), jnp.asarray([[1.0, 1.1, 2.0, 2.1]] * 4)
  goals = jnp.asarray([-0.1, 1.05, 1.9, 2.05])
  assert drawing._first_above(weights, cdf, goals).tolist() == [0, 2, 2, 2]


def small_weights(rows=500, size=20):
  """Small integers: sums are exact and ties are everywhere."""
  weights = np.random.default_rng(0).integers(0, 9, (rows, size)).astype(np.float32)
  weights[:, 0] += 1
  return weights


@pytest.mark.parametrize('k', [0, 1, 2, 7, 20, 50])
def test_top_k_against_a_sort(k):
  weights = small_weights()
  got = jax.jit(drawing.keep_top_k, static_argnums=1)(weights, k)
  threshold = np.sort(weights, axis=1)[:, -k if 0 < k < 20 else 0]
  np.testing.assert_array_equal(got, np.where(weights >= threshold[:, None], weights, 0))


@pytest.mark.parametrize('p', [1e-6, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_top_p_against_a_sort(p):
  weights = small_weights()
  got = jax.jit(drawing.keep_top_p, static_argnums=1)(weights, p)
  for row, kept in zip(weights, np.asarray(got), strict=True):
    falling = np.sort(row)[::-1]
    enough = np.cumsum(falling) >= np.float32(p) * row.sum()
    want = np.where(row >= falling[np.argmax(enough)], row, 0)
    np.testing.assert_array_equal(kept, want)


def test_top_p_by_hand():
  weights = jnp.asarray([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 7.0], [3.0, 3.0, 3.0, 1.0]])
  assert drawing.keep_top_p(weights, 0.7).tolist() == [
    [4.0, 3.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 7.0],
    [3.0, 3.0, 3.0, 0.0],  # the three tie
  ]


# Token by token; falling: tokens 1, 3, 4, 0, 2.
FIVE = (0.1, 0.4, 0.05, 0.25, 0.2)


@pytest.mark.parametrize(
  'how, kept',
  [
    ({}, (1, 3, 4, 0, 2)),
    ({'top_k': 2}, (1, 3)),
    ({'top_k': 9}, (1, 3, 4, 0, 2)),
    ({'top_p': 0.6}, (1, 3)),  # 0.65; one less would be 0.4
    ({'top_p': 0.7}, (1, 3, 4)),  # 0.85
    ({'top_p': 0.01}, (1,)),
    ({'min_p': 0.3}, (1, 3, 4)),  # at least 0.12
    ({'min_p': 0.6}, (1, 3)),  # at least 0.24
    ({'min_p': 1.0}, (1,)),
    ({'top_k': 3, 'top_p': 0.7}, (1, 3)),  # the share of 1 and 3 in the first three is 0.76
    ({'top_k': 4, 'min_p': 0.3}, (1, 3, 4)),
    ({'top_p': 0.75, 'min_p': 0.3}, (1, 3, 4)),  # min-p first would leave 1 and 3
    ({'top_k': 4, 'top_p': 0.9, 'min_p': 0.3}, (1, 3, 4)),
    ({'temperature': 0.0, 'top_k': 2, 'min_p': 0.9}, (1, 3, 4, 0, 2)),  # greedy leaves none out
  ],
  ids=str,
)
def test_kept_sets_and_log_probabilities_by_hand(how, kept):
  """Every token of the kept set is drawn, with p over the sum of the kept ones; no other is."""
  z, spread = jnp.log(jnp.asarray([FIVE] * 200)), (jnp.arange(200) + 0.5) / 200
  token_B, logp_B, weight_BV = draw(z, spread, spec(**how))
  ids_BK, size_B = drawing.kept_ids(weight_BV, 5)
  assert ids_BK[0].tolist() == [*kept, *[-1] * (5 - len(kept))] and set(size_B.tolist()) == {
    len(kept)
  }
  assert set(token_B.tolist()) == ({1} if how.get('temperature') == 0 else set(kept))
  want = np.log(np.asarray(FIVE)[token_B] / sum(FIVE[v] for v in kept))
  np.testing.assert_allclose(logp_B, want, rtol=1e-5, atol=1e-6)
  few_BK, size_B = drawing.kept_ids(weight_BV, 2)  # too few places: the size says so
  assert few_BK[0].tolist() == [*kept, -1][:2] and size_B[0] == len(kept)


@pytest.mark.parametrize(
  'how, kept',
  [
    ({'top_k': 1}, {0, 2}),
    ({'top_k': 3}, {0, 1, 2, 3}),
    ({'top_p': 0.2}, {0, 2}),
    ({'top_p': 0.7}, {0, 1, 2, 3}),
    ({'min_p': 1.0}, {0, 2}),
    ({'min_p': 0.5}, {0, 1, 2, 3}),
  ],
  ids=str,
)
def test_ties_at_the_boundary_stay_together(how, kept):
  """Weights 2, 1, 2, 1: both or neither."""
  z = jnp.log(jnp.asarray([[2.0, 1.0, 2.0, 1.0]]))
  token_B, logp_B, weight_BV = draw(z, jnp.asarray([0.0]), spec(**how))
  assert set(drawing.kept_ids(weight_BV, 4)[0][0].tolist()) - {-1} == kept
  np.testing.assert_allclose(logp_B.item(), np.log(2 / (4 if len(kept) == 2 else 6)), rtol=1e-6)


@pytest.mark.parametrize('how', [{'top_k': 3}, {'top_p': 0.5}, {'min_p': 0.1}], ids=str)
def test_logits_that_are_not_numbers_still_give_an_id(how):
  token_B, _, weight_BV = draw(jnp.full((1, V), jnp.nan), jnp.asarray([0.5]), spec(**how))
  assert token_B.item() in range(V)
  assert (np.asarray(drawing.kept_ids(weight_BV, 4)[0]) == -1).all()


def test_draw_by_hand():
  # Probabilities 1/8, 1/2, 3/8.
  z = jnp.log(jnp.asarray([[1.0, 4.0, 3.0]]))
  draws = {
    (spec(), 0.1): (0, 1 / 8),
    (spec(), 0.2): (1, 1 / 2),
    (spec(), 0.9): (2, 3 / 8),
    (spec(top_k=2), 0.1): (1, 4 / 7),
    (spec(top_k=1), 0.9): (1, 1),
    (spec(top_p=0.6), 0.99): (2, 3 / 7),
    (spec(top_p=0.5), 0.99): (1, 1),
    (spec(min_p=0.5), 0.99): (2, 3 / 7),
    (spec(temperature=0.0), 0.99): (1, 1 / 2),
  }
  for (how, u), (token, p) in draws.items():
    got, logp, _ = draw(z, jnp.asarray([u]), how)
    assert got.item() == token
    np.testing.assert_allclose(logp.item(), np.log(p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 0.6, 0.0])
def test_what_is_said_of_a_draw(temperature):
  """Of (1/8, 1/2, 3/8): at 0.6 they go as p^(1/0.6), that is 0.0577, 0.5820 and 0.3603.

  The plain log-probability and the entropy know of no truncation, and of no control.
  """
  p = np.asarray([1 / 8, 1 / 2, 3 / 8])
  plain = jnp.log(jnp.asarray([p], jnp.float32))
  barred = plain.at[0, 2].set(-jnp.inf)
  how = spec(temperature=temperature, top_k=1)
  drawn = drawing.draw(plain, barred, jnp.asarray([0.9]), how)
  assert drawn.token_B.item() == 1
  assert drawn.plain_B.item() == pytest.approx(np.log(1 / 2), abs=1e-6)
  # Of temperature 0 as of 1; what a control forbids has no part in the entropy.
  two = p[:2] ** (1 / (temperature or 1.0))
  two /= two.sum()
  assert drawn.entropy_B.item() == pytest.approx(-(two * np.log(two)).sum(), abs=1e-6)
  assert drawn.logp_B.item() == pytest.approx(np.log(two[1]) if not temperature else 0.0, abs=1e-6)
  whole = drawing.draw(plain, plain, jnp.asarray([0.0]), spec(temperature=0.6))
  assert whole.token_B.item() == 0
  assert np.exp(whole.logp_B.item()) == pytest.approx(0.0577, abs=1e-4)
  assert np.exp(whole.plain_B.item()) == pytest.approx(1 / 8, abs=1e-6)


def test_temperatures_by_row():
  """Each row as with a spec of its own; 0 is greedy, of the whole distribution."""
  rng = np.random.default_rng(0)
  z, u = jnp.asarray(3 * rng.normal(size=(6, 700)), jnp.float32), jnp.asarray(rng.random(6))
  temperature = np.asarray([1.0, 0.3, 0.0, 2.0, 0.0, 0.7], np.float32)
  how = spec(top_k=9, top_p=0.9)
  together = drawing.draw(z, z, u, how, jnp.asarray(temperature))
  for b, t in enumerate(temperature):
    alone = drawing.draw(z[b : b + 1], z[b : b + 1], u[b : b + 1], spec(float(t), 9, 0.9))
    assert together.token_B[b] == alone.token_B[0]
    for name in ('logp_B', 'plain_B', 'entropy_B'):
      want = getattr(alone, name)[0]
      np.testing.assert_allclose(getattr(together, name)[b], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shards', [2, 4])
def test_a_split_vocabulary_draws_the_same(shards):
  """The same tokens, kept sets and thresholds; 700 entries are no whole blocks."""
  rng = np.random.default_rng(0)
  weights = (rng.random((64, 700)) * (rng.random((64, 700)) < 0.3)).astype(np.float32)
  weights[:8, 175:] = 0  # all of it in the first shard
  weights[8:16, :525] = 0
  u = jnp.asarray(rng.random(64), jnp.float32)
  got = drawing.inverse_cdf(jnp.asarray(weights), u, shards)
  cdf = np.cumsum(weights.astype(np.float64), axis=1)
  goal = np.asarray(u, np.float64) * cdf[:, -1]
  near = np.abs(cdf - goal[:, None]).min(1) < 1e-5 * cdf[:, -1]
  assert near.sum() < 4
  want = np.asarray(inverse_cdf(weights, u))
  np.testing.assert_array_equal(np.asarray(got)[~near], want[~near])
  assert (weights[np.arange(64), got] > 0).all()
  for k in (1, 5, 300):
    one, two = (drawing.keep_top_k(jnp.asarray(weights), k, n) for n in (1, shards))
    np.testing.assert_array_equal(one, two)
  for most in (1, 5, 400):
    one, two = (drawing.kept_ids(jnp.asarray(weights), most, n) for n in (1, shards))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


def test_no_device_gathers_the_vocabulary():
  """Split over 8 devices: none holds [B, V], whatever is kept."""
  mesh = sharding.make_mesh(1, 1, 8)
  rows, vocab = 3, 8 * 640
  of = NamedSharding(mesh, PartitionSpec(None, 'tensor'))
  z = jax.ShapeDtypeStruct((rows, vocab), jnp.float32, sharding=of)
  u = jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
  for how in (spec(), spec(top_k=20, top_p=0.9, min_p=0.1), spec(temperature=0.0)):

    def run(z, u, shards, how=how):
      drawn = drawing.draw(z, z, u, how, None, shards)
      return drawn[:4], drawing.kept_ids(drawn.weight_BV, 20, shards)

    compiled = jax.jit(run, static_argnums=2).lower(z, u, 8).compile().as_text()
    assert f'[{rows},{vocab // 8}]' in compiled and f'[{rows},{vocab}]' not in compiled, how
  flat = jax.jit(run, static_argnums=2).lower(z, u, 1).compile().as_text()
  assert how.temperature == 0 or f'[{rows},{vocab}]' in flat
