"""The kernels as the rest of the code calls them, wrapped in `shard_map`.

On a mesh the scored tokens are split over all three axes, the head matrix is gathered once per call
(not per chunk), and the gradient of the head is summed over the mesh once per call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from reasonrl import types
from reasonrl.kernels import attention as attention_kernel
from reasonrl.kernels import dense as dense_kernel
from reasonrl.kernels import policy_loss

dense = dense_kernel.dense
attention = attention_kernel.attention
logits = policy_loss.logits


def forbid(vocab_size: int, ids) -> jax.Array:
  """bias_V, float32: -1e9 on forbidden ids, 0 elsewhere. One for sampler and scorer alike."""
  return jnp.zeros(vocab_size, jnp.float32).at[np.asarray(ids, np.int32)].set(-1e9)


def token_logps(hidden_MD, head_VD, bias_V, targets_M, support, form, rows: int, mesh: Mesh):
  """logp_M, entropy_M, likeliest_M: see `kernels.policy_loss`. M divisible by the mesh."""

  def run(hidden_MD, head_VD, bias_V, targets_M, support):
    return policy_loss.token_logps(hidden_MD, head_VD, bias_V, targets_M, support, form, rows)

  if mesh.size == 1:
    return run(hidden_MD, head_VD, bias_V, targets_M, support)
  tokens, whole = types.TOKENS, PartitionSpec()
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(tokens, whole, whole, tokens, tokens),
    out_specs=(tokens, tokens, tokens),
    check_vma=False,
  )(hidden_MD, head_VD, bias_V, targets_M, support)


def token_loss(
  hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, form, rows: int, mesh: Mesh
):
  """(sum of fn over tokens, {metric: [M]}): see `kernels.policy_loss.token_loss`."""

  def run(hidden_MD, head_VD, bias_V, targets_M, support, aux):
    return policy_loss.token_loss(
      hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, form, rows
    )

  def local(*args):
    loss, metrics = run(*args)
    return jax.lax.psum(loss, types.MESH_AXES), metrics

  if mesh.size == 1:
    return run(hidden_MD, head_VD, bias_V, targets_M, support, aux)
  tokens, whole = types.TOKENS, PartitionSpec()
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(tokens, whole, whole, tokens, tokens, tokens),
    out_specs=(whole, tokens),
    check_vma=False,
  )(hidden_MD, head_VD, bias_V, targets_M, support, aux)
