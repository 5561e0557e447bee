"""Numbers worked by hand on arXiv 2402.03300, 2503.14476 and 2503.20783, then invariances."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl import rl_math

# ------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize(
  'ratio, adv, loss, slope, low, high',
  [
    (1.3, 1.0, -1.2, 0.0, 0, 1),
    (1.3, -1.0, 1.3, 1.0, 0, 0),
    (0.7, 1.0, -0.7, -1.0, 0, 0),
    (0.7, -1.0, 0.8, 0.0, 1, 0),
    (1.1, 2.0, -2.2, -2.0, 0, 0),
    (1.3, 0.0, 0.0, 0.0, 0, 0),
  ],
)
def test_ppo_clip_by_hand(ratio, adv, loss, slope, low, high):
  got, *clipped = rl_math.ppo_clip(jnp.float32(ratio), jnp.float32(adv), 0.2, 0.2, None, None)
  assert float(got) == pytest.approx(loss, abs=1e-6)
  assert [float(x) for x in clipped] == [low, high]
  derivative = jax.grad(lambda r: rl_math.ppo_clip(r, adv, 0.2, 0.2, None, None)[0])(
    jnp.float32(ratio)
  )
  assert float(derivative) == pytest.approx(slope, abs=1e-6)


def test_clip_higher_moves_the_upper_bound_alone():
  clip = lambda r, a: [float(x) for x in rl_math.ppo_clip(jnp.float32(r), a, 0.2, 0.28, None, None)]
  assert clip(1.25, 1.0) == pytest.approx([-1.25, 0, 0])
  assert clip(1.3, 1.0) == pytest.approx([-1.28, 0, 1])
  assert clip(0.7, -1.0) == pytest.approx([0.8, 1, 0])


def test_epsilon_ten_leaves_no_lower_bound():
  # R1's epsilon: 1 - 10 < 0, and a ratio is positive.
  got = rl_math.ppo_clip(jnp.float32(1e-3), -1.0, 10.0, 10.0, None, None)
  assert [float(x) for x in got] == pytest.approx([1e-3, 0, 0])


def test_ratio_of_one_has_the_gradient_of_the_advantage():
  # jnp.minimum splits the gradient of a tie in two halves: they must add up.
  slope = jax.grad(lambda r: rl_math.ppo_clip(r, jnp.float32(0.7), 0.2, 0.2, None, None)[0])(
    jnp.float32(1.0)
  )
  assert float(slope) == pytest.approx(-0.7)


@pytest.mark.parametrize(
  'ratio, adv, loss, slope, high',
  [(10.0, -1.0, 3.0, 0.0, 1), (2.0, -1.0, 2.0, 1.0, 0), (10.0, 1.0, -1.2, 0.0, 1)],
)
@pytest.mark.parametrize('bound', ['dual_clip', 'delta'])
def test_dual_clip_and_delta_are_the_same_bound_in_two_places(bound, ratio, adv, loss, slope, high):
  """c = 3 caps the loss at 3 |A|, delta = 3 the ratio at 3, for A < 0."""
  bounds = (3.0, None) if bound == 'dual_clip' else (None, 3.0)

  def run(r):
    return rl_math.ppo_clip(r, jnp.float32(adv), 0.2, 0.2, *bounds)

  got, _, clipped = run(jnp.float32(ratio))
  assert (float(got), float(clipped)) == (pytest.approx(loss), high)
  assert float(jax.grad(lambda r: run(r)[0])(jnp.float32(ratio))) == pytest.approx(slope, abs=1e-6)


def test_cispo_by_hand():
  """A clipped token keeps its gradient: cap 1.28, ratio 1.5, A = 1."""

  def run(logp, lowest=None):
    return rl_math.cispo(logp, jnp.exp(logp - jnp.log(0.4)), 1.0, lowest, 1.28)

  logp = jnp.log(0.6)
  loss, below, above = run(logp)
  assert float(loss) == pytest.approx(-1.28 * math.log(0.6))
  assert float(jax.grad(lambda x: run(x)[0])(logp)) == pytest.approx(-1.28)
  assert (float(below), float(above)) == (0, 1)
  logp = jnp.log(0.2)  # ratio .5
  assert float(jax.grad(lambda x: run(x)[0])(logp)) == pytest.approx(-0.5)
  assert float(jax.grad(lambda x: run(x, 0.8)[0])(logp)) == pytest.approx(-0.8)


def test_sapo_by_hand():
  # r = 1: -(4 / tau) sigmoid(0) A = -2 A / tau, slope -A.
  for adv, tau in ((1.0, 1.0), (-1.0, 1.05)):
    run = lambda r: rl_math.sapo(r, jnp.float32(adv), 1.0, 1.05)  # noqa: B023
    assert float(run(jnp.float32(1.0))) == pytest.approx(-2 * adv / tau)
    assert float(jax.grad(run)(jnp.float32(1.0))) == pytest.approx(-adv)
  # r = 2, A = 1: slope -4 s (1 - s), s = sigmoid(1) = .731059.
  slope = jax.grad(lambda r: rl_math.sapo(r, jnp.float32(1.0), 1.0, 1.05))(jnp.float32(2.0))
  assert float(slope) == pytest.approx(-0.786448, abs=1e-6)


def test_vespo_weight_by_hand():
  # phi(1) = 1; w = 2, A > 0: exp(3) 2^2 exp(-6) = .199148; A < 0: exp(2) 2^3 exp(-4) = 1.082682.
  phi = lambda w, adv: float(rl_math.vespo_weight(jnp.log(w), adv, 2.0, 3.0, 3.0, 2.0))
  assert [phi(1.0, 1.0), phi(1.0, -1.0)] == pytest.approx([1.0, 1.0])
  assert [phi(2.0, 1.0), phi(2.0, -1.0)] == pytest.approx([0.199148, 1.082682], abs=1e-6)
  assert phi(2.0, 0.0) == phi(2.0, 1.0)
  grad = jax.grad(lambda x: rl_math.vespo_weight(x, 1.0, 2.0, 3.0, 3.0, 2.0))(jnp.float32(0.3))
  assert float(grad) == 0.0


def test_segment_sums():
  got = rl_math.segment_sum(jnp.float32([[1, 2, 4, 8]]), jnp.int32([[1, 2, 1, 0]]), 3)
  np.testing.assert_array_equal(got, [[5, 2, 5, 8]])


# ------------------------------------------------------------------------------------ KL


def k3(logp, ref, weight):
  return rl_math.kl('k3', logp, ref, 1.0, weight)


@pytest.mark.parametrize('ref, want', [(0.25, 0.193147), (0.75, 0.094535), (0.5, 0.0)])
def test_k3_by_hand(ref, want):
  got = k3(jnp.log(0.5), jnp.log(ref), jnp.float32(1.0))
  assert float(got) == pytest.approx(want, abs=1e-6)


def test_mean_k3_is_the_kl():
  # KL((.5, .5) || (.25, .75)) = .143841
  got = k3(jnp.log(jnp.full(2, 0.5)), jnp.log(jnp.array([0.25, 0.75])), jnp.ones(2))
  assert float(got.mean()) == pytest.approx(0.143841, abs=1e-6)


def test_k3_of_close_distributions_does_not_cancel():
  # exp(d) - d - 1 in float32 is 0 or 1e-7 here; the truth is d^2 / 2 = 5e-9.
  got = k3(jnp.float32(-1.0), jnp.float32(-1.0001), jnp.float32(1.0))
  d = np.float64(np.float32(-1.0001)) + 1.0
  assert float(got) == pytest.approx(d * d / 2, rel=1e-2)


def test_every_estimator_by_hand():
  """d = log(.25 / .5) = -.693147: k1 .693147, k2 .240227, k3 .193147; ratio 2."""
  got = {
    name: float(rl_math.kl(name, jnp.log(0.5), jnp.log(0.25), 2.0, jnp.float32(1.0)))
    for name in rl_math.KL
  }
  want = {'k1': 0.693147, 'k2': 0.240227, 'k3': 0.193147, 'ratio_k3': 0.386294, 'k3_plus': 0.193147}
  assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
  'estimator, truth',
  [
    ('k1', 'zero'),
    ('k2', 'reverse'),
    ('k3', 'forward'),
    ('ratio_k3', 'reverse'),
    ('k3_plus', 'reverse'),
  ],
)
def test_the_gradient_of_every_estimator_in_expectation(estimator, truth):
  """Exact expectation over a 5-way softmax, tokens drawn from the policy itself."""
  rng = np.random.default_rng(0)
  z, ref = jnp.float32(rng.normal(size=5)), jax.nn.log_softmax(jnp.float32(rng.normal(size=5)))
  p = jax.nn.softmax(z)

  def estimate(z):
    logp = jax.nn.log_softmax(z)
    ratio = jnp.exp(logp - jax.nn.log_softmax(jax.lax.stop_gradient(z)))
    return (p * rl_math.kl(estimator, logp, ref, ratio, jnp.ones(5))).sum()

  def reverse(z):
    logp = jax.nn.log_softmax(z)
    return (jnp.exp(logp) * (logp - ref)).sum()

  def forward(z):
    return (jnp.exp(ref) * (ref - jax.nn.log_softmax(z))).sum()

  wants = {'zero': jnp.zeros(5), 'reverse': jax.grad(reverse)(z), 'forward': jax.grad(forward)(z)}
  np.testing.assert_allclose(jax.grad(estimate)(z), wants[truth], atol=1e-6)
  assert float(jnp.abs(wants['forward'] - wants['reverse']).max()) > 0.05


@pytest.mark.parametrize('estimator', ['k2', 'ratio_k3'])
def test_off_policy_only_the_ratio_keeps_the_gradient(estimator):
  """Tokens drawn from pi_old: E[r k3] still has the gradient of KL(pi || ref), E[k2] has not."""
  rng = np.random.default_rng(1)
  z, z_old = (jnp.float32(rng.normal(size=5)) for _ in range(2))
  ref = jax.nn.log_softmax(jnp.float32(rng.normal(size=5)))
  old = jax.nn.log_softmax(z_old)

  def estimate(z):
    logp = jax.nn.log_softmax(z)
    kl = rl_math.kl(estimator, logp, ref, jnp.exp(logp - old), jnp.ones(5))
    return (jnp.exp(old) * kl).sum()

  def reverse(z):
    logp = jax.nn.log_softmax(z)
    return (jnp.exp(logp) * (logp - ref)).sum()

  gap = float(jnp.abs(jax.grad(estimate)(z) - jax.grad(reverse)(z)).max())
  assert gap < 1e-6 if estimator == 'ratio_k3' else gap > 0.05


# ------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize('junk', [1e3, -1e3, np.nan, np.inf])
@pytest.mark.parametrize('where', [0, 1, 2, 3])
def test_masked_tokens_cannot_reach_value_or_gradient(junk, where):
  weight = jnp.array([1.0, 0.0, 1.0])

  def total(logp, old, ref, adv):
    ratio = jnp.exp(rl_math.log_ratio(logp, old, weight))
    loss = rl_math.ppo_clip(ratio, adv, 0.2, 0.2, None, None)[0] + 0.1 * rl_math.kl(
      'k3', logp, ref, ratio, weight
    )
    return jnp.where(weight > 0, weight * loss, 0.0).sum()

  def at(x):
    arrays = np.float32([[-1, -1, -2], [-1.1, -1, -2], [-1.5, -1.5, -1.5], [1, 1, -1]])
    arrays[where, 1] = x
    value, grad = jax.value_and_grad(total)(*arrays)
    return np.asarray(value), np.asarray(grad)

  (value, grad), (clean, want) = at(junk), at(-1.0)
  assert value == clean
  np.testing.assert_array_equal(grad, want)
  assert np.isfinite(want).all() and want[0] != 0 and want[2] != 0 and want[1] == 0
