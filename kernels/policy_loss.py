"""Token losses from hidden states and the head matrix, without logits in memory.

    z_mv   = temperature^-1 * (cap(scale * h_m . W_v) + bias_v)
    logp_m = z_m,target - logsumexp_v z_mv          entropy_m = -sum_v p_mv log p_mv
    loss   = sum_m fn(logp_m, entropy_m, aux_m)

A token may have been drawn from less than that, and its softmax then runs over what it was drawn
from, as does v in every sum below. `support` says so, token by token:

  kept_MK    the ids that truncated sampling (top-k, top-p, min-p) kept
  barred_MK  ids that it could not be
  plain_M    1: a token that nobody drew, scored as text: at temperature 1

Two operations, both over chunks of R rows, so that nothing larger than [R, V] exists beside W and
its gradient:

  token_logps   forward only: logp, entropy, whether it is the likeliest.          2MDV FLOPs
  token_loss    gradient in forward: a chunk's logits are made once, fn's own
                derivative turns them into dlogits, and dhidden and dW follow
                immediately.                                                        6MDV FLOPs

For any fn the derivative of the loss by a logit is one expression (a = dL/dlogp, e = dL/dentropy):

    dz_v = scale cap'(z) / temperature * [ a (1[v = target] - p_v) - e p_v (log p_v + entropy) ]

Left out on purpose: the Pallas back ends and the vocabulary-sharded form.
"""

import functools

import jax
import jax.numpy as jnp

from reasonrl.kernels import dense


def logits(hidden_RD, head_VD, bias_V, form):
  """float32 tempered logits z_RV: what the sampler draws from and the losses score."""
  return _logits(hidden_RD, head_VD, bias_V, form, {})[0]


def _logits(hidden_RD, head_VD, bias_V, form, support):
  """z_RV on the support of each token, and its derivative by scale * h . W there."""
  scale, softcap, temperature, compute_dtype = form
  z_RV = dense.contract(hidden_RD, head_VD, (1, 1), compute_dtype) * scale
  slope = 1.0
  if softcap is not None:
    z_RV = softcap * jnp.tanh(z_RV / softcap)
    slope = 1.0 - (z_RV / softcap) ** 2
  if 'plain' in support:
    temperature = jnp.where(support['plain'][:, None] > 0, 1.0, temperature)
  z_RV = (z_RV + bias_V[None, :]) / temperature
  if 'barred' in support:
    z_RV = jnp.where(_holds(support['barred'], z_RV.shape), -1e9, z_RV)
  if 'kept' in support:  # a token without any keeps all of them
    whole_R1 = jnp.all(support['kept'] < 0, axis=1, keepdims=True)
    z_RV = jnp.where(_holds(support['kept'], z_RV.shape) | whole_R1, z_RV, -1e9)
  return z_RV, slope / temperature


def _holds(id_RK, shape):
  """bool [R, V]: the ids of each row, -1 = none."""
  id_RK = jnp.where(id_RK < 0, shape[1], id_RK)  # outside of the array, which drops the write
  return jnp.zeros(shape, bool).at[jnp.arange(shape[0])[:, None], id_RK].set(True, mode='drop')


def _score(z_RV, targets_R):
  """logp_R, entropy_R and the log-probabilities they come from."""
  logp_RV = z_RV - jax.nn.logsumexp(z_RV, axis=-1, keepdims=True)
  # A forbidden token has log p near -1e9 and p = 0: the product is 0, as it should be.
  entropy_R = -jnp.sum(jnp.exp(logp_RV) * logp_RV, axis=-1)
  return jnp.take_along_axis(logp_RV, targets_R[:, None], axis=1)[:, 0], entropy_R, logp_RV


def _chunks(rows, tree):
  """[M, ...] leaves -> [n, at most rows, ...]: equal chunks, the last one zero-padded."""
  M = jax.tree.leaves(tree)[0].shape[0]
  n = -(-M // rows)
  pad = -M % n

  def split(x):
    x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(n, -1, *x.shape[1:])

  return jax.tree.map(split, tree)


def token_logps(hidden_MD, head_VD, bias_V, targets_M, support, form, rows):
  """Forward-only scoring, float32: logp_M, entropy_M, and likeliest_M, 1 where no token of the
  support has a larger log-probability, else 0. Arguments as in `token_loss`."""

  def one(_, chunk):
    hidden_RD, targets_R, support_R = chunk
    z_RV, _ = _logits(hidden_RD, head_VD, bias_V, form, support_R)
    logp_R, entropy_R, logp_RV = _score(z_RV, targets_R)
    return None, (logp_R, entropy_R, (logp_R >= logp_RV.max(axis=1)).astype(jnp.float32))

  _, out = jax.lax.scan(one, None, _chunks(rows, (hidden_MD, targets_M, support)))
  return tuple(x.reshape(-1)[: targets_M.shape[0]] for x in out)


def token_loss_ref(hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, form):
  """The materialised twin: what autodiff makes of the formula."""
  z_MV, _ = _logits(hidden_MD, head_VD, bias_V, form, support)
  logp_M, entropy_M, _ = _score(z_MV, targets_M)
  loss_M, metrics = fn(logp_M, entropy_M, aux)
  return loss_M.sum(), metrics


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def token_loss(hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, form, rows):
  """sum_m fn(logp_m, entropy_m, aux_m), differentiable in hidden_MD and head_VD only.

  Args:
    hidden_MD: hidden states, one per scored token (those at the token before it).
    head_VD: output matrix; V rows, [out, in].
    bias_V: float32, added to the scores before the temperature (-1e9 forbids a token).
    targets_M: int32, the scored tokens.
    support: dict with some of 'kept' and 'barred', int32 [M, K] of ids, padded with -1 (no ids at
      all: nothing is left out), and 'plain', [M]; see the head of this file.
    aux: dict of [M] arrays for `fn`. Padding must have fn(...) == 0 for all-zero aux, because
      the last chunk is padded with zeros.
    fn: (logp_R, entropy_R, aux_R) -> (loss_R, {name: metric_R}), elementwise over tokens.
    form: (scale, softcap or None, temperature, compute_dtype), static.
    rows: the most tokens per chunk, static.

  Returns:
    loss, float32 scalar; metrics, {name: [M] float32} without gradient.
  """
  logp_M, entropy_M, _ = token_logps(hidden_MD, head_VD, bias_V, targets_M, support, form, rows)
  loss_M, metrics = fn(logp_M, entropy_M, aux)
  return loss_M.sum(), metrics


def _forward(hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, form, rows):
  scale, compute_dtype = form[0], form[3]

  def one(carry, chunk):
    loss, dhead_VD = carry
    hidden_RD, targets_R, support_R, aux_R = chunk
    z_RV, slope = _logits(hidden_RD, head_VD, bias_V, form, support_R)
    logp_R, entropy_R, logp_RV = _score(z_RV, targets_R)
    loss_R, pull, metrics = jax.vjp(
      lambda logp, entropy: fn(logp, entropy, aux_R), logp_R, entropy_R, has_aux=True
    )
    a_R, e_R = pull(jnp.ones_like(loss_R))
    dz_RV = -jnp.exp(logp_RV) * (a_R[:, None] + e_R[:, None] * (logp_RV + entropy_R[:, None]))
    dz_RV = dz_RV.at[jnp.arange(dz_RV.shape[0]), targets_R].add(a_R)
    dz_RV = dz_RV * (slope * scale)
    dhidden_RD = dense.contract(dz_RV, head_VD, (1, 0), compute_dtype)
    dhead_VD = dhead_VD + dense.contract(dz_RV, hidden_RD, (0, 0), compute_dtype)
    return (loss + loss_R.sum(), dhead_VD), (dhidden_RD.astype(hidden_RD.dtype), metrics)

  start = (jnp.zeros((), jnp.float32), jnp.zeros(head_VD.shape, jnp.float32))
  (loss, dhead_VD), (dhidden, metrics) = jax.lax.scan(
    one, start, _chunks(rows, (hidden_MD, targets_M, support, aux))
  )
  M = targets_M.shape[0]
  metrics = jax.tree.map(lambda x: x.reshape(-1)[:M], metrics)
  dhidden_MD = dhidden.reshape(-1, hidden_MD.shape[-1])[:M]
  return (loss, metrics), (dhidden_MD, dhead_VD.astype(head_VD.dtype))


def _backward(fn, form, rows, residuals, cotangents):
  dhidden_MD, dhead_VD = residuals
  ct = cotangents[0]
  scaled = lambda x: (ct * x).astype(x.dtype)
  return scaled(dhidden_MD), scaled(dhead_VD), None, None, None, None


token_loss.defvjp(_forward, _backward)


def cases():
  """(name, M, D, V, rows, scale, softcap, temperature) for the comparison with `token_loss_ref`."""
  return [
    ('one token', 1, 8, 11, 4, 1.0, None, 1.0),
    ('ragged chunk', 13, 8, 11, 4, 1.0, None, 1.0),
    ('temperature', 12, 8, 300, 5, 1.0, None, 0.6),
    ('softcap', 9, 16, 33, 4, 0.5, 3.0, 1.0),
  ]
