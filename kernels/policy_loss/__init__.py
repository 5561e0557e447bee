"""Token losses from hidden states and the head matrix, without logits in memory.

    z_mv   = temperature^-1 * (cap(scale * h_m . W_v) + bias_v)
    logp_m = z_m,target - logsumexp_v z_mv          entropy_m = -sum_v p_mv log p_mv
    loss   = sum_m fn(logp_m, entropy_m, aux_m)

A token may have been drawn from less than that, and its softmax then runs over what it was drawn
from, as does v in every sum below. `support` says so, token by token:

  kept_MK    the ids that truncated sampling (top-k, top-p, min-p) kept
  barred_MK  ids that it could not be
  plain_M    1: a token that nobody drew, scored as text: at temperature 1

Operations, all over chunks of R rows, so that nothing larger than [R, V] exists beside W and its
gradient:

  token_logps        forward only: what the model says of given tokens.             2MDV FLOPs
  value_and_grads    gradient in forward: a chunk's logits are made once, fn's own
                     derivative turns them into dlogits, and dhidden and dW follow
                     immediately; dW is added to a given buffer.                     6MDV FLOPs
  fused_policy_loss  the same behind a custom VJP, for autodiff.

For any fn the derivative of the loss by a logit is one expression (a = dL/dlogp, e = dL/dentropy):

    dz_v = scale cap'(z) / temperature * [ a (1[v = target] - p_v) - e p_v (log p_v + entropy) ]

With m = max_v z, l = sum_v exp(z - m) and u = sum_v exp(z - m) (z - m) it needs no other sums:

    logp = z_target - m - log l          entropy = log l - u / l
    dz_v = ... [ a 1[v = target] - exp(z_v - m) (A + E (z_v - m)) ]
           A = (a + e (entropy - log l)) / l          E = e / l

(m, l, u) of parts of the vocabulary merge, whoever holds them: lanes, programs or devices.

Back ends, one file each: `forward` gives (m, l, u), `backward` makes the two products of dz.

  xla         everywhere, every support
  pallas_tpu  Mosaic: logits never leave the chip when scoring; `support` may hold 'plain' alone
  pallas_gpu  Triton around the platform's products; the same support

`reference.py` is the materialised twin: what autodiff makes of the formula.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from reasonrl.kernels import dense
from reasonrl.kernels.policy_loss import pallas_gpu, pallas_tpu, softmax, xla

OUTSIDE = softmax.OUTSIDE
BACKENDS = {'xla': xla, 'pallas_tpu': pallas_tpu, 'pallas_gpu': pallas_gpu}


class Spec(NamedTuple):
  """How it is computed; static."""

  form: tuple  # scale, softcap or None, temperature, compute_dtype
  rows: int  # tokens whose logits exist at a time: at most, but at least a block of a kernel's
  backend: str  # of BACKENDS
  # Inside shard_map: the mesh axis that head_VD and bias_V are split over. None: they are whole.
  vocab_axis: str | None


class Scores(NamedTuple):
  """What the model says of tokens; float32 [M]."""

  logp: jax.Array
  entropy: jax.Array  # nats
  lse: jax.Array  # logsumexp_v z
  # 1 where no token of the support has a larger log-probability, else 0; the kernels, which sum
  # the target's logit in another order than the maximum, take 1e-5 (1 + |maximum|) for equal.
  likeliest: jax.Array


def logits(hidden_RD, head_VD, bias_V, form):
  """float32 tempered logits z_RV: what the sampler draws from and the losses score."""
  scale, softcap, temperature, compute_dtype = form
  z_RV = dense.project(hidden_RD, head_VD, compute_dtype) * scale
  return (softmax.cap(z_RV, softcap) + bias_V[None, :]) / temperature


def token_logps(hidden_MD, head_VD, bias_V, targets_M, support, spec: Spec) -> Scores:
  """Forward-only scoring: 2MDV FLOPs. Arguments as in `fused_policy_loss`."""
  backend = _backend(spec, support)
  weights = backend.weights(head_VD, bias_V, spec.form)
  targets_M, support = _local(targets_M, support, head_VD, spec.vocab_axis)

  def one(_, chunk):
    sums, z_target, _ = backend.forward(weights, *chunk, spec.form, False)
    return None, _scores(*_merged(sums, z_target, spec.vocab_axis), backend.TIE)

  chunks = _chunks(spec, backend, (hidden_MD, targets_M, support))
  _, out = jax.lax.scan(one, None, chunks)
  return jax.tree.map(lambda x: x.reshape(-1)[: targets_M.shape[0]], out)


def value_and_grads(hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, spec: Spec, dhead_VD):
  """The loss and both gradients, without autodiff: 6MDV FLOPs.

  Args: as in `fused_policy_loss`, and
    dhead_VD: float32, what dhead is added to. Inside a donating jit this is done in place.

  Returns:
    (loss, metrics), (dhidden_MD in the dtype of hidden_MD, dhead_VD). With `vocab_axis` the
    gradient of the hidden states is summed over it, once.
  """
  backend = _backend(spec, support)
  weights = backend.weights(head_VD, bias_V, spec.form)
  targets_M, support = _local(targets_M, support, head_VD, spec.vocab_axis)
  # Parts of a sum over devices are kept in float32 until they are summed.
  dtype = jnp.float32 if spec.vocab_axis else hidden_MD.dtype

  def one(carry, chunk):
    loss, dhead_VD = carry
    hidden_RD, targets_R, support_R, aux_R = chunk
    sums, z_target, saved = backend.forward(
      weights, hidden_RD, targets_R, support_R, spec.form, True
    )
    sums, z_target = _merged(sums, z_target, spec.vocab_axis)
    scores = _scores(sums, z_target, backend.TIE)
    loss_R, pull, metrics = jax.vjp(
      lambda logp, entropy: fn(logp, entropy, aux_R), scores.logp, scores.entropy, has_aux=True
    )
    a_R, e_R = pull(jnp.ones_like(loss_R))
    slopes = softmax.slopes(sums, scores.entropy, a_R, e_R)
    dhidden_RD, dhead_VD = backend.backward(
      weights, saved, hidden_RD, targets_R, support_R, slopes, dhead_VD, spec.form
    )
    return (loss + loss_R.sum(), dhead_VD), (dhidden_RD.astype(dtype), metrics)

  start = (jnp.zeros((), jnp.float32), dhead_VD)
  chunks = _chunks(spec, backend, (hidden_MD, targets_M, support, aux))
  (loss, dhead_VD), (dhidden, metrics) = jax.lax.scan(one, start, chunks)
  M = targets_M.shape[0]
  metrics = jax.tree.map(lambda x: x.reshape(-1)[:M], metrics)
  dhidden_MD = dhidden.reshape(-1, hidden_MD.shape[-1])[:M]
  if spec.vocab_axis:
    dhidden_MD = jax.lax.psum(dhidden_MD, spec.vocab_axis).astype(hidden_MD.dtype)
  return (loss, metrics), (dhidden_MD, dhead_VD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def fused_policy_loss(hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, spec: Spec):
  """sum_m fn(logp_m, entropy_m, aux_m), differentiable in hidden_MD and head_VD only.

  The door for autodiff; who can add gradients up by hand saves a [V, D] array: `value_and_grads`.

  Args:
    hidden_MD: hidden states, one per scored token (those at the token before it).
    head_VD: output matrix; V rows, [out, in].
    bias_V: float32, added to the scores before the temperature (-1e9 forbids a token).
    targets_M: int32, the scored tokens; one that counts must lie in its support.
    support: dict with some of 'kept' and 'barred', int32 [M, K] of ids, padded with -1 (no ids at
      all: nothing is left out), and 'plain', [M]; see the head of this file.
    aux: dict of [M] arrays for `fn`. Padding must have fn(...) == 0 for all-zero aux, because
      the last chunk is padded with zeros.
    fn: (logp_R, entropy_R, aux_R) -> (loss_R, {name: metric_R}), elementwise over tokens.
    spec: static.

  Returns:
    loss, float32 scalar; metrics, {name: [M] float32} without gradient.

  Raises:
    ValueError: the back end is unknown, or cannot do what `support` asks for.
  """
  scores = token_logps(hidden_MD, head_VD, bias_V, targets_M, support, spec)
  loss_M, metrics = fn(scores.logp, scores.entropy, aux)
  return loss_M.sum(), metrics


def _forward(hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, spec):
  zeros = jnp.zeros(head_VD.shape, jnp.float32)
  out, (dhidden_MD, dhead_VD) = value_and_grads(
    hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, spec, zeros
  )
  return out, (dhidden_MD, dhead_VD.astype(head_VD.dtype))


def _backward(fn, spec, residuals, cotangents):
  del fn, spec
  scaled = (x * cotangents[0] for x in residuals)
  return *(x.astype(y.dtype) for x, y in zip(scaled, residuals, strict=True)), *(None,) * 4


fused_policy_loss.defvjp(_forward, _backward)


def _backend(spec, support):
  if spec.backend not in BACKENDS:
    raise ValueError(f'backend={spec.backend!r} is not one of {", ".join(BACKENDS)}')
  backend = BACKENDS[spec.backend]
  beyond = sorted(set(support) - backend.SUPPORT)
  if beyond:
    raise ValueError(f'backend={spec.backend!r} has no support {beyond}; xla has')
  return backend


def _chunks(spec, backend, tree):
  """[M, ...] leaves -> [n, rows, ...]: equal chunks of at most spec.rows, the last zero-padded."""
  M, D = tree[0].shape
  most = backend.most_rows(spec.rows, D, spec.form)
  n = -(-M // most)
  size = -(-M // n)
  size += -size % backend.ROW_MULTIPLE

  def split(x):
    x = jnp.pad(x, ((0, n * size - M),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(n, size, *x.shape[1:])

  return jax.tree.map(split, tree)


def _local(targets_M, support, head_VD, vocab_axis):
  """Ids as rows of this device's part of the head; V is what another device has, -1 still none."""
  if vocab_axis is None:
    return targets_M, support
  V = head_VD.shape[0]

  def local(ids):
    own = ids - jax.lax.axis_index(vocab_axis) * V
    return jnp.where(ids < 0, -1, jnp.where((own >= 0) & (own < V), own, V))

  ids = {name: local(x) for name, x in support.items() if name != 'plain'}
  return local(targets_M), support | ids


def _merged(sums, z_target_R, vocab_axis):
  """Over all devices that hold a part of the vocabulary: one maximum and one sum of [R] arrays."""
  if vocab_axis is None:
    return sums, z_target_R
  top = lambda x: jax.lax.pmax(x, vocab_axis)
  add = lambda x: jax.lax.psum(x, vocab_axis)
  return softmax.merge(sums, top, add), add(z_target_R)


def _scores(sums, z_target_R, tie: float) -> Scores:
  log_total = jnp.log(sums.total)
  gap = z_target_R - sums.top
  likeliest = gap >= -tie * (1.0 + jnp.abs(sums.top))
  return Scores(
    logp=gap - log_total,
    entropy=log_total - sums.moment / sums.total,
    lse=sums.top + log_total,
    likeliest=likeliest.astype(jnp.float32),
  )


def cases():
  """(name, M, D, V, rows, scale, softcap, temperature) for the comparison with the twin."""
  return [
    ('one token', 1, 8, 11, 4, 1.0, None, 1.0),
    ('ragged chunk', 13, 8, 11, 4, 1.0, None, 1.0),
    ('temperature', 12, 8, 300, 5, 1.0, None, 0.6),
    ('softcap', 9, 16, 33, 4, 0.5, 3.0, 1.0),
  ]
