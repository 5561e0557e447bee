"""Frequencies by hand for four pairs, the published models' in words, and the rotation itself.

The decoder's use of them is in test_decoder.py, against an oracle and against transformers.
"""

import math

import jax.numpy as jnp
import numpy as np

from reasonrl.models import rope

L = 2 * math.pi * 100  # tokens in which the pairs of theta 10^4, C 8 turn 100, 10, 1 and 0.1 times


def close(got, want, tolerance=1e-12):
  np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def turn(x_BTHC, positions_BT, theta, amplitude=1.0):
  frequency_c = rope.default(theta, x_BTHC.shape[-1])
  return rope.rotate(x_BTHC, *rope.rotation(jnp.asarray(positions_BT), frequency_c, amplitude))


def test_default_and_linear_by_hand():
  assert rope.default(1e4, 8).dtype == np.float64
  close(rope.default(1e4, 8), [1, 0.1, 0.01, 0.001])
  close(rope.linear(1e4, 8, 4.0), [0.25, 0.025, 0.0025, 0.00025])


def test_llama3_by_hand():
  # 100 turns are above 19: kept. 1 and 0.1 are not above 1: divided by 4. 10 is half way between
  # 1 and 19: half of 0.1, half of 0.025.
  close(rope.llama3(1e4, 8, 4.0, L, 1.0, 19.0), [1, 0.0625, 0.0025, 0.00025])


def test_yarn_by_hand():
  # 100 / 10^i turns: 50 turns lie at i = 0.3, down to 0; 0.3 turns at i = 2.5, up to 3. Of pairs
  # 1 and 2, two thirds and one third are kept, the rest is divided by 4.
  close(rope.yarn(1e4, 8, 4.0, L, 50.0, 0.3), [1, 0.075, 0.005, 0.00025])
  # 2 turns at i = 1.7, down to 1; 0.3 as before.
  close(rope.yarn(1e4, 8, 4.0, L, 2.0, 0.3), [1, 0.1, 0.00625, 0.00025])
  # Ends outside of the pairs: 10^4 turns at i = -2, 10^-7 at i = 9; the ramp is from 0 to 7.
  close(rope.yarn(1e4, 8, 4.0, L, 1e4, 1e-7), [1, 0.1 * 25 / 28, 0.01 * 22 / 28, 0.001 * 19 / 28])
  close(rope.yarn_amplitude(1.0), 1.0)
  close(rope.yarn_amplitude(math.e**5), 1.5)


def test_a_yarn_ramp_between_neighbours_is_a_step():
  # 0.5 turns lie at i = 2.3, up to 3, and 0.6 at i = 2.2, down to 2.
  close(rope.yarn(1e4, 8, 4.0, L, 0.6, 0.5), [1, 0.1, 0.01, 0.00025])
  # No pair turns 101 times, so all are slow; yet the authors keep the first.
  close(rope.yarn(1e4, 8, 4.0, L, 1e7, 101.0), [1, 0.025, 0.0025, 0.00025])


def counts(scaled, theta, head_dim, factor):
  """How many pairs are kept, blended, divided by the factor."""
  ratio = rope.default(theta, head_dim) / scaled
  kept, divided = np.isclose(ratio, 1, rtol=1e-9), np.isclose(ratio, factor, rtol=1e-9)
  return kept.sum(), (~kept & ~divided).sum(), divided.sum()


def test_published_models():
  # Llama 3.1: 8192 tokens hold 4 turns of pair 64 ln(8192 / 8 pi) / ln 5e5 = 28.2 and 1 turn of
  # pair 64 ln(8192 / 2 pi) / ln 5e5 = 35.0 (34.98).
  llama = rope.llama3(5e5, 128, 8.0, 8192, 1.0, 4.0)
  assert counts(llama, 5e5, 128, 8.0) == (29, 6, 29)
  # Qwen 2.5: 32768 tokens hold 32 turns of pair 64 ln(32768 / 64 pi) / ln 1e6 = 23.6 and 1 turn of
  # pair 64 ln(32768 / 2 pi) / ln 1e6 = 39.7; the ramp is from 23 to 40.
  qwen = rope.yarn(1e6, 128, 4.0, 32768, 32.0, 1.0)
  assert counts(qwen, 1e6, 128, 4.0) == (24, 16, 24)


def test_a_factor_of_one_changes_nothing():
  plain = rope.default(500.0, 16)
  close(rope.linear(500.0, 16, 1.0), plain)
  close(rope.llama3(500.0, 16, 1.0, 64, 1.0, 4.0), plain)
  close(rope.yarn(500.0, 16, 1.0, 64, 32.0, 1.0), plain)


def test_rotation_by_hand():
  # Two channels turn by the position itself.
  x = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (1, 3, 1, 2))
  out = turn(x, [[0, 1, 2]], 10000.0)[0, :, 0]
  close(out, [[1.0, 0.0], [math.cos(1), math.sin(1)], [math.cos(2), math.sin(2)]], 1e-5)
  # Four channels: (0, 2) turn by the position, (1, 3) by position * theta^(-1/2).
  x = jnp.asarray([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
  want = np.array([math.cos(5), -math.sin(0.5), math.sin(5), math.cos(0.5)])
  close(turn(x, [[5]], 100.0)[0, 0, 0], want, 1e-5)
  close(turn(x, [[5]], 100.0, amplitude=1.5)[0, 0, 0], 1.5 * want, 1e-5)


def test_products_depend_on_the_distance_alone():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
  at = lambda x, position: turn(x, [[position]], 1000.0)
  products = [jnp.sum(at(q, 3 + shift) * at(k, shift)) for shift in (0, 7, 300)]
  close(products, [products[0]] * 3, 1e-4)
