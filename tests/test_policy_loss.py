"""The fused loss against its materialised twin and a float64 oracle; what it keeps in memory."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from reasonrl.kernels import policy_loss
from reasonrl.kernels.policy_loss import reference as twin
from reasonrl.kernels.policy_loss import xla as xla_backend

F32, BF16 = jnp.dtype('float32'), jnp.dtype('bfloat16')
CASES = {name: rest for name, *rest in policy_loss.cases()}


def loss_fn(logp, entropy, aux):
  """Nonlinear in both, with a clip whose gradient is zero on one side; 0 for all-zero aux."""
  ratio = jnp.exp(logp - aux['old'])
  loss = -jnp.minimum(ratio * aux['adv'], jnp.clip(ratio, 0.8, 1.2) * aux['adv'])
  loss = loss + 0.3 * jnp.expm1(-logp - 1.0) - 0.2 * entropy**2
  return aux['weight'] * loss, {'ratio': ratio, 'entropy': entropy}


def inputs(M, D, V, seed=0, dtype=F32):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), F32)
  head = 0.5 * normal(V, D)
  targets = jnp.asarray(rng.integers(0, V, M), jnp.int32)
  aux = {'weight': jnp.abs(normal(M)), 'adv': normal(M), 'old': normal(M) - math.log(V)}
  return normal(M, D).astype(dtype), head.astype(dtype), jnp.zeros(V), targets, aux


def xla(form, rows):
  return policy_loss.Spec(form, rows, 'xla', None)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def fused(hidden, head, bias, targets, aux, fn, form, rows, support=None):
  run = functools.partial(policy_loss.fused_policy_loss, fn=fn, spec=xla(form, rows))
  loss = lambda *a: run(*a, bias, targets, support or {}, aux)
  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)


@functools.partial(jax.jit, static_argnums=(5, 6))
def reference(hidden, head, bias, targets, aux, fn, form, support=None):
  loss = lambda *a: twin.policy_loss(*a, bias, targets, support or {}, aux, fn, form)
  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)


def assert_close(got, want, rtol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize('name', CASES)
def test_equals_the_materialised_twin(name):
  M, D, V, rows, *form = CASES[name]
  args, form = inputs(M, D, V), (*form, F32)
  got = fused(*args, loss_fn, form, rows)
  assert_close(got, reference(*args, loss_fn, form), 1e-5)  # value, metrics, both gradients
  (_, metrics), _ = got
  logp, entropy, *_ = policy_loss.token_logps(*args[:4], {}, xla(form, rows))
  np.testing.assert_allclose(metrics['entropy'], entropy, rtol=1e-6)
  np.testing.assert_allclose(metrics['ratio'], jnp.exp(logp - args[4]['old']), rtol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_scores_equal_the_float64_oracle(name):
  M, D, V, rows, scale, softcap, temperature = CASES[name]
  hidden, head, _, targets, _ = inputs(M, D, V)
  bias = jnp.zeros(V).at[3].set(0.7)
  form = (scale, softcap, temperature, F32)
  got = policy_loss.token_logps(hidden, head, bias, targets, {}, xla(form, rows))
  want = oracle.scores(hidden, head, targets, scale, softcap, temperature, bias)
  np.testing.assert_allclose(got[0], want[0], atol=2e-6)
  np.testing.assert_allclose(got[1], want[1], atol=2e-6)


def test_gradients_equal_differences_of_the_float64_oracle():
  """Softcap, scale, temperature, bias and entropy together, by a loss written twice."""
  hidden, head, _, targets, aux = inputs(3, 4, 5)
  bias = jnp.array([0.0, 0.4, 0.0, -0.3, 0.0])
  form = (0.7, 2.0, 0.6, F32)

  def want(hidden, head):
    logp, entropy = oracle.scores(hidden, head, targets, *form[:3], bias)
    ratio = np.exp(logp - np.asarray(aux['old'], np.float64))
    adv = np.asarray(aux['adv'], np.float64)
    loss = -np.minimum(ratio * adv, np.clip(ratio, 0.8, 1.2) * adv)
    loss = loss + 0.3 * np.expm1(-logp - 1.0) - 0.2 * entropy**2
    return (np.asarray(aux['weight'], np.float64) * loss).sum()

  (value, _), (dhidden, dhead) = fused(hidden, head, bias, targets, aux, loss_fn, form, 2)
  assert float(value) == pytest.approx(want(hidden, head), rel=1e-5)
  differ = oracle.numerical_gradient
  np.testing.assert_allclose(dhidden, differ(lambda h: want(h, head), hidden), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dhead, differ(lambda w: want(hidden, w), head), rtol=1e-4, atol=1e-5)


def test_entropy_gradient_by_hand():
  """Two words, p = (1/4, 3/4): H = .562335, dH/dz = (p0 p1 log 3, -p0 p1 log 3) = +-.205990."""
  head = jnp.array([[0.0], [math.log(3.0)]])
  args = (jnp.ones((1, 1)), head, jnp.zeros(2), jnp.array([0]), {})
  only_entropy = lambda logp, entropy, aux: (entropy, {})
  (value, _), (_, dhead) = fused(*args, only_entropy, (1.0, None, 1.0, F32), 1)
  assert float(value) == pytest.approx(0.562335, abs=1e-6)
  np.testing.assert_allclose(dhead[:, 0], [0.205990, -0.205990], atol=1e-6)


def test_forbidden_tokens_have_no_probability_entropy_or_gradient():
  hidden, head, bias, targets, aux = inputs(6, 4, 7)
  targets = targets % 5
  keep = jnp.arange(5)  # forbidding the last two words = a vocabulary without them
  form = (1.0, None, 0.6, F32)
  bias = bias.at[jnp.array([5, 6])].set(-1e9)
  (value, metrics), grads = fused(hidden, head, bias, targets, aux, loss_fn, form, 4)
  small = fused(hidden, head[keep], jnp.zeros(5), targets, aux, loss_fn, form, 4)
  assert_close(((value, metrics), (grads[0], grads[1][keep])), small, 1e-5)
  assert (np.asarray(grads[1])[5:] == 0).all()


def kept_ids(targets, V, K, seed=0):
  """int32 [M, K]: the target somewhere among 0 to K - 1 other ids; every third row has none."""
  rng, out = np.random.default_rng(seed), np.full((len(targets), K), -1, np.int32)
  for m, target in enumerate(np.asarray(targets)):
    ids = rng.permutation(V)[: rng.integers(0, K)]
    ids = np.append(ids[ids != target], target)
    out[m, : ids.size] = rng.permutation(ids)
  out[::3] = -1
  return jnp.asarray(out)


def test_kept_ids_by_hand():
  """Probabilities 1/2, 1/4, 1/8, 1/8; of the first and third alone 4/5 and 1/5."""
  head = jnp.log(jnp.array([[4.0], [2.0], [1.0], [1.0]]))
  args = (jnp.ones((3, 1)), head, jnp.zeros(4), jnp.array([0, 2, 2]))
  kept = {'kept': jnp.array([[2, 0], [-1, 2], [-1, -1]])}
  form = (1.0, None, 1.0, F32)
  logp, entropy, *_ = policy_loss.token_logps(*args, kept, xla(form, 2))
  np.testing.assert_allclose(logp, np.log([4 / 5, 1, 1 / 8]), atol=1e-6)
  both = math.log(5) - 0.8 * math.log(4)
  np.testing.assert_allclose(entropy, [both, 0, 1.75 * math.log(2)], atol=1e-6)
  weigh = lambda logp, entropy, aux: (aux['weight'] * logp, {})
  first = {'weight': jnp.array([1.0, 0.0, 0.0])}
  _, (_, dhead) = fused(*args, first, weigh, form, 2, kept)
  np.testing.assert_allclose(dhead[:, 0], [1 / 5, 0, -1 / 5, 0], atol=1e-6)


@pytest.mark.parametrize('name', CASES)
def test_kept_ids_equal_the_materialised_twin(name):
  M, D, V, rows, *form = CASES[name]
  args, form = inputs(M, D, V), (*form, F32)
  kept = {'kept': kept_ids(args[3], V, 5)}
  got = fused(*args, loss_fn, form, rows, kept)
  assert_close(got, reference(*args, loss_fn, form, kept), 1e-5)
  want = oracle.scores(*args[:2], args[3], *form[:3], kept_MK=kept['kept'])
  got = policy_loss.token_logps(*args[:4], kept, xla(form, rows))
  np.testing.assert_allclose(got[:2], want, atol=2e-6)


def test_gradients_over_kept_ids_equal_differences_of_the_float64_oracle():
  hidden, head, bias, targets, aux = inputs(4, 4, 7)
  form, kept = (0.7, 2.0, 0.6, F32), kept_ids(targets, 7, 4)

  def want(hidden, head):
    logp, entropy = oracle.scores(hidden, head, targets, *form[:3], bias, kept)
    return (np.asarray(aux['weight'], np.float64) * (logp * logp - entropy**2)).sum()

  fn = lambda logp, entropy, aux: (aux['weight'] * (logp**2 - entropy**2), {})
  (value, _), (dhidden, dhead) = fused(
    hidden, head, bias, targets, aux, fn, form, 3, {'kept': kept}
  )
  assert float(value) == pytest.approx(want(hidden, head), rel=1e-5)
  differ = oracle.numerical_gradient
  np.testing.assert_allclose(dhidden, differ(lambda h: want(h, head), hidden), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dhead, differ(lambda w: want(hidden, w), head), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_to_float32():
  """bf16 operands, float32 sums: relative errors of a per cent; dtypes follow the operands."""
  args = inputs(32, 16, 40, dtype=BF16)
  args32 = [x.astype(F32) for x in args[:3]] + list(args[3:])
  nll = lambda logp, entropy, aux: (-aux['weight'] * logp, {})
  (got, _), grads = fused(*args, nll, (1.0, None, 1.0, BF16), 8)
  (want, _), grads32 = fused(*args32, nll, (1.0, None, 1.0, F32), 8)
  assert got.dtype == F32 and [g.dtype for g in grads] == [BF16, BF16]
  assert float(got) == pytest.approx(float(want), rel=1e-3)
  for a, b in zip(grads, grads32, strict=True):
    error = jnp.linalg.norm(a.astype(F32) - b) / jnp.linalg.norm(b)
    assert 1e-4 < float(error) < 1e-2


def test_weight_zero_everywhere_is_exactly_zero():
  *args, aux = inputs(9, 8, 11)
  aux = {**aux, 'weight': jnp.zeros(9)}
  (value, _), grads = fused(*args, aux, loss_fn, (1.0, None, 1.0, F32), 4)
  assert float(value) == 0.0
  assert all((np.asarray(g) == 0).all() for g in grads)


def test_chunk_size_changes_rounding_alone():
  args = inputs(13, 8, 11)
  whole = fused(*args, loss_fn, (1.0, None, 1.0, F32), 64)
  for rows in (1, 5, 13):
    assert_close(fused(*args, loss_fn, (1.0, None, 1.0, F32), rows), whole, 1e-5)


def test_a_cotangent_scales_both_gradients():
  hidden, head, bias, targets, aux = inputs(5, 4, 6)
  form = (1.0, None, 1.0, F32)
  run = functools.partial(policy_loss.fused_policy_loss, fn=loss_fn, spec=xla(form, 2))
  loss = lambda *a: -2.5 * run(*a, bias, targets, {}, aux)[0]
  scaled = jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, head)
  _, grads = fused(hidden, head, bias, targets, aux, loss_fn, form, 2)
  assert_close(scaled, [-2.5 * g for g in grads], 1e-6)


# ------------------------------------------------------------------------------------ memory


def arrays(compiled) -> dict[str, int]:
  """Every array shape in the optimized program, with its number of elements."""
  shapes = set(re.findall(r'\b[a-z]+[0-9]+\[([0-9,]+)\]', compiled.as_text()))
  return {shape: math.prod(map(int, shape.split(','))) for shape in shapes}


def check_memory(compiled, M, D, V, rows, scores=False):
  """Raises AssertionError if anything is larger than a chunk of logits or what the caller holds;
  of a program that only scores, than a tile of them."""
  found, words = arrays(compiled), xla_backend.TILE * rows if scores else V
  assert f'{words},{rows}' in found  # logits: we are reading the right program
  limit = max(words * rows, V * D, M * D)
  assert limit < M * V
  above = {shape: n for shape, n in found.items() if n > limit}
  assert not above, f'larger than {limit} elements: {above}'
  # The logits, tiles of what follows from them, and [V, D] sums; not a function of M * V.
  tile = xla_backend.TILE * rows * rows
  allowed = 4 * (words * rows + 5 * tile + 4 * V * D + 8 * M * D + 64 * M) + 4096
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < allowed, f'{temporary} bytes of temporaries, {allowed} allowed'


@pytest.mark.parametrize(
  'M, V, dtype',
  [*((M, V, BF16) for M in (320, 640) for V in (640, 1280)), (320, 640, F32), (640, 1280, F32)],
)
def test_no_buffer_above_one_chunk_of_logits(M, V, dtype):
  D, rows, form = 8, 16, (1.0, None, 1.0, dtype)
  args = inputs(M, D, V)
  score = jax.jit(policy_loss.token_logps, static_argnums=5)
  ids = jnp.zeros((M, 4), jnp.int32)
  for support in ({}, {'kept': ids, 'barred': ids, 'plain': jnp.zeros(M)}):
    check_memory(fused.lower(*args, loss_fn, form, rows, support).compile(), M, D, V, rows)
    compiled = score.lower(*args[:4], support, xla(form, rows)).compile()
    check_memory(compiled, M, D, V, rows, scores=True)


def test_the_materialised_twin_fails_the_memory_check():
  M, D, V, rows, form = 320, 8, 640, 16, (1.0, None, 1.0, F32)
  args = inputs(M, D, V)
  compiled = reference.lower(*args, loss_fn, form).compile()
  assert arrays(compiled)[f'{M},{V}'] == M * V
  with pytest.raises(AssertionError):
    check_memory(compiled, M, D, V, rows)


def test_scoring_does_no_gradient_work():
  """The primal outside a gradient is the scoring path: 2MDV, not 6MDV FLOPs."""
  M, D, V, rows, form = 320, 8, 640, 16, (1.0, None, 1.0, F32)
  *args, aux = inputs(M, D, V)
  run = functools.partial(policy_loss.fused_policy_loss, fn=loss_fn, spec=xla(form, rows))
  program = jax.jit(run).lower(*args, {}, aux)
  assert program.as_text().count('dot_general') == 1
  check_memory(program.compile(), M, D, V, rows, scores=True)
  gradient = fused.lower(*args, aux, loss_fn, form, rows).as_text()
  assert gradient.count('dot_general') == 3


def test_barred_ids_and_plain_tokens_by_hand():
  """Weights 4, 2, 1, 1, the third forbidden. Drawn at temperature .5 the others have 16, 4, 1 of
  21, without the first 4, 1 of 5; as text 4, 2, 1 of 7."""
  head = jnp.log(jnp.array([[4.0], [2.0], [1.0], [1.0]]))
  bias = jnp.array([0.0, 0.0, -1e9, 0.0])
  args = (jnp.ones((4, 1)), head, bias, jnp.array([1, 1, 1, 0]))
  support = {
    'barred': jnp.array([[-1, -1], [0, -1], [-1, -1], [1, 3]]),
    'plain': jnp.array([0.0, 0.0, 1.0, 0.0]),
  }
  form = (1.0, None, 0.5, F32)
  logp, entropy, _, likeliest = policy_loss.token_logps(*args, support, xla(form, 3))
  np.testing.assert_allclose(logp, np.log([4 / 21, 4 / 5, 2 / 7, 1]), atol=1e-6)
  assert likeliest.tolist() == [0, 1, 0, 1]
  np.testing.assert_allclose(entropy[2:], [math.log(7) - 10 / 7 * math.log(2), 0], atol=1e-6)
  weigh = lambda logp, entropy, aux: (aux['weight'] * logp, {})
  # d log p(target) / d z is 1[v = target] - p, times 1 / temperature where it was drawn.
  wants = [-32 / 21, 34 / 21, 0, -2 / 21], [0, 2 / 5, 0, -2 / 5], [-4 / 7, 5 / 7, 0, -1 / 7]
  for m, want in enumerate(wants):
    one = {'weight': jnp.eye(4)[m]}
    _, (_, dhead) = fused(*args, one, weigh, form, 3, support)
    np.testing.assert_allclose(dhead[:, 0], want, atol=1e-6)


@pytest.mark.parametrize('name', CASES)
def test_support_equals_the_materialised_twin(name):
  M, D, V, rows, *form = CASES[name]
  args, form = inputs(M, D, V), (*form, F32)
  barred = np.random.default_rng(4).integers(-1, V, (M, 3))
  barred[barred == np.asarray(args[3])[:, None]] = -1  # a token was not drawn from what is barred
  support = {
    'barred': jnp.asarray(barred, jnp.int32),
    'kept': kept_ids(args[3], V, 5),
    'plain': jnp.asarray(np.arange(M) % 2, jnp.float32),
  }
  got = fused(*args, loss_fn, form, rows, support)
  assert_close(got, reference(*args, loss_fn, form, support), 1e-5)
