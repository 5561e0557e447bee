"""Every back end of the fused loss against a float64 oracle, on shapes that break kernels.

The Mosaic kernels run in JAX's interpreter of TPUs, which has their memories, copies and races;
the Triton kernels, which alias nothing, in the plain one.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from reasonrl.kernels import policy_loss
from reasonrl.kernels.policy_loss import pallas_gpu, pallas_tpu

F32, BF16 = jnp.dtype('float32'), jnp.dtype('bfloat16')


@dataclasses.dataclass(frozen=True)
class Case:
  M: int = 9
  D: int = 16
  V: int = 40
  rows: int = 512
  scale: float = 1.0
  softcap: float | None = None
  temperature: float = 1.0
  dtype: jnp.dtype = F32
  gain: float = 0.5  # of the head
  masked: bool = False  # no token counts
  ties: bool = False  # all words are alike
  plain: bool = False  # every second token is scored as text
  bias: bool = False  # one word forbidden, one favoured


CASES = {
  'one token': Case(M=1),
  'all masked': Case(masked=True),
  'ties': Case(ties=True),
  'huge logits': Case(gain=3000.0),
  'vocabulary ends within a tile': Case(V=513, D=24),  # one word of it
  'more tiles than programs': Case(M=3, D=8, V=4500),
  'narrow': Case(D=1, V=5),
  'several chunks': Case(M=600, V=64),
  'softcap and bias': Case(V=600, softcap=3.0, scale=0.5, temperature=0.6, bias=True, plain=True),
  'bfloat16': Case(M=30, V=530, D=40, dtype=BF16, temperature=0.7, bias=True),
}


@pytest.fixture(autouse=True)
def interpreters(monkeypatch):
  monkeypatch.setattr(pallas_tpu, 'INTERPRET', pltpu.InterpretParams(detect_races=True))
  monkeypatch.setattr(pallas_gpu, 'INTERPRET', True)
  yield
  if interpret_pallas_call.races is not None:
    assert not interpret_pallas_call.races.races_found


def make(case: Case):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), F32)
  hidden, head = normal(case.M, case.D), case.gain * normal(case.V, case.D)
  if case.ties:
    head = jnp.broadcast_to(head[:1], head.shape)
  bias = jnp.zeros(case.V)
  if case.bias:
    bias = bias.at[3].set(-1e9).at[case.V - 1].set(0.7)
  targets = rng.integers(4, case.V, case.M)
  targets[0] = case.V - 1
  slopes = {'logp': normal(case.M), 'entropy': normal(case.M)}
  if case.masked:
    slopes = {name: jnp.zeros(case.M) for name in slopes}
  support = {'plain': jnp.arange(case.M) % 2.0} if case.plain else {}
  return (
    *(hidden.astype(case.dtype), head.astype(case.dtype), bias),
    *(jnp.asarray(targets, jnp.int32), support, slopes, normal(case.V, case.D)),
  )


def linear(logp, entropy, slopes):
  """A loss with any cotangents one likes."""
  return slopes['logp'] * logp + slopes['entropy'] * entropy, {}


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('backend', policy_loss.BACKENDS)
def test_scores_and_gradients_equal_the_float64_oracle(backend, name):
  case = CASES[name]
  hidden, head, bias, targets, support, slopes, start = make(case)
  form = (case.scale, case.softcap, case.temperature, case.dtype)
  spec = policy_loss.Spec(form, case.rows, backend, None)
  score = jax.jit(functools.partial(policy_loss.token_logps, spec=spec))
  step = jax.jit(
    functools.partial(policy_loss.value_and_grads, fn=linear, spec=spec), donate_argnames='dhead_VD'
  )
  scores = score(hidden, head, bias, targets, support)
  buffer = jnp.array(start)
  args = (hidden, head, bias, targets, support, slopes)
  (loss, _), (dhidden, dhead) = step(*args, dhead_VD=buffer)
  assert buffer.is_deleted()  # what is accumulated into is donated

  temperature = np.where(support.get('plain', np.zeros(case.M)) > 0, 1.0, case.temperature)
  want = [
    oracle.scores(
      *(hidden[m : m + 1], head, targets[m : m + 1]),
      *(case.scale, case.softcap, temperature[m], bias),
    )
    for m in range(case.M)
  ]
  logp, entropy = (np.concatenate([row[i] for row in want]) for i in range(2))
  # float32 logits of size z are good to a few z / 2^24, however they are summed.
  size = case.scale * np.abs(np.float64(hidden) @ np.float64(head).T).max() / case.temperature
  close = functools.partial(np.testing.assert_allclose, atol=2e-6 * max(1.0, size), rtol=0)
  close(scores.logp, logp)
  close(scores.entropy, entropy)
  total = (slopes['logp'] * logp + slopes['entropy'] * entropy).sum()
  close(loss, total, rtol=1e-4 if size > 100 else 1e-5)
  if case.ties:
    assert scores.likeliest.all()
    np.testing.assert_allclose(entropy, np.log(case.V))

  slope = (slopes['logp'], slopes['entropy'])
  form = (case.scale, case.softcap, temperature, bias)
  dhidden64, dhead64 = oracle.score_gradients(hidden, head, targets, *slope, *form)
  tolerance = {F32: 1e-5, BF16: 1e-2}[case.dtype] * (100 if size > 100 else 1)
  for got, exact, before in ((dhidden, dhidden64, 0.0), (dhead, dhead64, np.float64(start))):
    gap = np.linalg.norm(np.float64(got) - before - exact)
    assert gap <= tolerance * np.linalg.norm(exact) + 1e-7 * np.linalg.norm(before) + 2e-6
  assert dhidden.dtype == case.dtype and dhead.dtype == F32


@pytest.mark.parametrize('backend', policy_loss.BACKENDS)
def test_likeliest_is_the_largest_logit(backend):
  """Every token of the vocabulary asked of one hidden state: exactly one of them is it."""
  rng = np.random.default_rng(3)
  hidden = jnp.broadcast_to(jnp.asarray(rng.normal(size=(1, 16)), F32), (40, 16))
  head = jnp.asarray(rng.normal(size=(40, 16)), F32)
  spec = policy_loss.Spec((1.0, None, 1.0, F32), 512, backend, None)
  args = hidden, head, jnp.zeros(40), jnp.arange(40), {}
  scores = policy_loss.token_logps(*args, spec)
  assert scores.likeliest.sum() == 1
  assert scores.likeliest.argmax() == (head @ hidden[0]).argmax()
  np.testing.assert_allclose(scores.lse, jax.nn.logsumexp(head @ hidden[0]), rtol=1e-5)


@pytest.mark.parametrize('backend', ['pallas_tpu', 'pallas_gpu'])
def test_ids_in_the_support_are_refused_by_name(backend):
  args = make(Case())
  spec = policy_loss.Spec((1.0, None, 1.0, F32), 512, backend, None)
  ids = {'kept': jnp.zeros((9, 2), jnp.int32), 'barred': jnp.zeros((9, 2), jnp.int32)}
  with pytest.raises(ValueError, match=rf"'{backend}' has no support \['barred', 'kept'\]"):
    policy_loss.token_logps(*args[:4], ids, spec)


def test_an_unknown_back_end_is_named_with_the_choices():
  spec = policy_loss.Spec((1.0, None, 1.0, F32), 512, 'cuda', None)
  with pytest.raises(ValueError, match="'cuda' is not one of xla, pallas_tpu, pallas_gpu"):
    policy_loss.token_logps(*make(Case())[:4], {}, spec)


def test_a_width_that_does_not_fit_on_chip_memory_is_refused():
  form = (1.0, None, 1.0, BF16)
  assert pallas_tpu.most_rows(2048, 2048, form) == 2048
  assert pallas_tpu.most_rows(4096, 4096, form) == 1536
  with pytest.raises(ValueError, match='a width of 16384 does not fit'):
    pallas_tpu.most_rows(2048, 16384, form)
