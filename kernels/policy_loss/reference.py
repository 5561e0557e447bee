"""The materialised twin of the fused loss: what autodiff makes of the formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def logits(hidden_MD, head_VD, bias_V, support, form):
  """float32 z_MV on the support of each token."""
  scale, softcap, temperature, compute_dtype = form
  operands = hidden_MD.astype(compute_dtype), head_VD.astype(compute_dtype)
  z_MV = scale * jnp.matmul(
    operands[0], operands[1].T, precision='highest', preferred_element_type=jnp.float32
  )
  if softcap is not None:
    z_MV = softcap * jnp.tanh(z_MV / softcap)
  temperature_M1 = jnp.full((z_MV.shape[0], 1), temperature)
  if 'plain' in support:
    temperature_M1 = jnp.where(support['plain'][:, None] > 0, 1.0, temperature)
  z_MV = (z_MV + bias_V[None, :]) / temperature_M1
  ids = lambda name: (support[name][:, :, None] == jnp.arange(z_MV.shape[1])[None, None, :]).any(
    axis=1
  )
  if 'barred' in support:
    z_MV = jnp.where(ids('barred'), -1e9, z_MV)
  if 'kept' in support:
    none = (support['kept'] < 0).all(axis=1, keepdims=True)
    z_MV = jnp.where(ids('kept') | none, z_MV, -1e9)
  return z_MV


def token_logps(hidden_MD, head_VD, bias_V, targets_M, support, form):
  """logp_M, entropy_M."""
  logp_MV = jax.nn.log_softmax(logits(hidden_MD, head_VD, bias_V, support, form))
  # A forbidden token has log p near -1e9 and p = 0: the product is 0, as it should be.
  entropy_M = -jnp.sum(jnp.exp(logp_MV) * logp_MV, axis=-1)
  return jnp.take_along_axis(logp_MV, targets_M[:, None], axis=1)[:, 0], entropy_M


def policy_loss(hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, form):
  """sum_m fn(logp_m, entropy_m, aux_m), and metrics."""
  loss_M, metrics = fn(*token_logps(hidden_MD, head_VD, bias_V, targets_M, support, form), aux)
  return loss_M.sum(), metrics
