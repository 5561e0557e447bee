"""The kernels as the rest of the code calls them: back end by platform, wrapped in `shard_map`.

On a mesh the scored tokens of the loss are split as rows are, over data and fsdp, and the
vocabulary over tensor. The head matrix is gathered over fsdp once per call (not per chunk), its
gradient is scattered back once; devices that share tokens exchange numbers per token, and the
gradient of the hidden states once.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from reasonrl import types
from reasonrl.kernels import decode_attention as decode_attention_kernel
from reasonrl.kernels import decode_attention_gpu, policy_loss
from reasonrl.kernels import dense as dense_kernel
from reasonrl.kernels import self_attention as self_attention_kernel
from reasonrl.kernels.policy_loss import pallas_tpu

dense = dense_kernel.dense
Stored = decode_attention_kernel.Stored
Packed = self_attention_kernel.Packed
quantize = decode_attention_kernel.quantize
logits = policy_loss.logits

BACKENDS = ('auto', *policy_loss.BACKENDS)
# Tokens whose logits exist at a time: on a CPU they should stay near the cores, on an accelerator
# they pay for reading and writing the gradient of the head.
ROWS = {'cpu': 512, 'tpu': 2048, 'gpu': 4096}


def forbid(vocab_size: int, ids) -> jax.Array:
  """bias_V, float32: -1e9 on forbidden ids, 0 elsewhere. One for sampler and scorer alike."""
  return jnp.zeros(vocab_size, jnp.float32).at[np.asarray(ids, np.int32)].set(-1e9)


def self_attention(
  q_BHTC, k_BKTC, v_BKTC, packed: Packed, window, scale, softcap, mesh: Mesh | None
):
  """Causal attention within the sequences of rows: see `kernels.self_attention`.

  On a mesh, rows are split over data and fsdp, and heads over tensor where it divides them.
  """
  backend = attention_backend(_device(mesh), q_BHTC, softcap)

  def run(q_BHTC, k_BKTC, v_BKTC, packed):
    return self_attention_kernel.self_attention(
      q_BHTC, k_BKTC, v_BKTC, packed, window, scale, softcap, backend
    )

  # What is no kernel the compiler splits itself.
  if backend == 'xla' or mesh is None or mesh.size == 1:
    return run(q_BHTC, k_BKTC, v_BKTC, packed)
  heads = 'tensor' if k_BKTC.shape[1] % mesh.shape['tensor'] == 0 else None
  rows, axes, around = types.ROWS, set(mesh.axis_names), jax.sharding.get_abstract_mesh()
  if around.manual_axes:  # inside the sampler, whose rows are split already
    rows, mesh, axes = PartitionSpec(None), around, {'tensor'}
    if around.shape['tensor'] == 1:
      return run(q_BHTC, k_BKTC, v_BKTC, packed)
  of_heads = PartitionSpec(rows[0], heads)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(of_heads, of_heads, of_heads, rows),
    out_specs=of_heads,
    axis_names=axes,
    check_vma=False,
  )(q_BHTC, k_BKTC, v_BKTC, packed)


def decode_attention(
  q_BHTC, k_BKTC, v_BKTC, own, shared, visible_BTT, visible_BTS, visible_BTP, scale, softcap,
  mesh: Mesh | None,
):  # fmt: skip
  """See `kernels.decode_attention`."""
  tensor = 1 if mesh is None else mesh.shape['tensor']
  backend = decode_backend(_device(mesh), q_BHTC.shape[-1], tensor)
  see = visible_BTT, visible_BTS, visible_BTP
  return decode_attention_kernel.decode_attention(
    q_BHTC, k_BKTC, v_BKTC, own, shared, *see, scale, softcap, backend
  )


def decode_backend(device, head_dim: int, tensor: int) -> str:
  """Of `kernels.decode_attention`: the kernel on GPUs that it is compiled for in the tests, for
  heads that are not split over `tensor` devices."""
  fits = tensor == 1 and decode_attention_gpu.supports(head_dim)
  return 'pallas_gpu' if fits and getattr(device, 'compute_capability', None) == '9.0' else 'xla'


def _device(mesh: Mesh | None):
  """Whose kernels are taken."""
  return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def attention_backend(device, q_BHTC, softcap) -> str:
  """Of `kernels.self_attention`: the platform's own kernel where it can do this."""
  if q_BHTC.dtype != jnp.bfloat16:  # in float32 the kernels multiply in less
    return 'xla'
  if device.platform == 'tpu':
    return 'splash'
  # 8.0: Ampere. AMD's capabilities are names.
  if re.fullmatch(r'([89]|\d\d)\.\d', getattr(device, 'compute_capability', '')):
    C = q_BHTC.shape[-1]
    return 'cudnn' if softcap is None and C <= 128 and C % 8 == 0 else 'xla'
  return 'xla'


def shares_prefixes(device, dtype: str) -> bool:
  """Whether attention here knows segments that continue another (`Packed.prefixes`)."""
  return device.platform != 'tpu' or dtype != 'bfloat16'  # which is splash


def loss_spec(backend: str, rows: int, form, support, D: int, mesh: Mesh) -> policy_loss.Spec:
  """How the loss is computed on this mesh.

  Args:
    backend: of BACKENDS; 'auto' takes a kernel on the chips that it is compiled for in the tests
      (TPU v5e and v6e; GPUs of compute capability 9.0), if it can do what `support` asks for at
      this width.
    rows: tokens of a device whose logits exist at a time, see `policy_loss.Spec`; 0: ROWS.
  """
  device = _device(mesh)
  if backend == 'auto':
    backend = 'xla'
    if device.device_kind in ('TPU v5 lite', 'TPU v6 lite') and pallas_tpu.capacity(D, form):
      backend = 'pallas_tpu'
    if getattr(device, 'compute_capability', None) == '9.0':
      backend = 'pallas_gpu'
    if set(support) - policy_loss.BACKENDS[backend].SUPPORT:
      backend = 'xla'
  axis = 'tensor' if mesh.shape['tensor'] > 1 else None
  return policy_loss.Spec(form, rows or ROWS.get(device.platform, ROWS['gpu']), backend, axis)


def token_logps(
  hidden_MD, head_VD, bias_V, targets_M, support, spec: policy_loss.Spec, mesh: Mesh
) -> policy_loss.Scores:
  """See `kernels.policy_loss.token_logps`. M must be divisible by data x fsdp."""

  def local(hidden_MD, head_VD, bias_V, targets_M, support):
    head_VD = _gather(head_VD, spec)
    return policy_loss.token_logps(hidden_MD, head_VD, bias_V, targets_M, support, spec)

  if mesh.size == 1:
    return policy_loss.token_logps(hidden_MD, head_VD, bias_V, targets_M, support, spec)
  head_VD, bias_V = _padded(head_VD, bias_V, mesh)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(types.ROWS, HEAD, VOCABULARY, types.ROWS, types.ROWS),
    out_specs=types.ROWS,
    check_vma=False,
  )(hidden_MD, head_VD, bias_V, targets_M, support)


def policy_loss_and_grads(
  hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, spec: policy_loss.Spec, mesh: Mesh,
  dhead_VD,
):  # fmt: skip
  """(sum of fn over tokens, {metric: [M]}), (dhidden_MD, dhead_VD).

  See `kernels.policy_loss.value_and_grads`; the gradient of the head is added to dhead_VD.
  """

  def local(hidden_MD, head_VD, bias_V, targets_M, support, aux, dhead_VD):
    head_VD = _gather(head_VD, spec)
    alone = mesh.shape['data'] * mesh.shape['fsdp'] == 1
    start = dhead_VD if alone else jnp.zeros(head_VD.shape, jnp.float32)
    (loss, metrics), (dhidden_MD, new_VD) = policy_loss.value_and_grads(
      hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, spec, start
    )
    if not alone:
      new_VD = jax.lax.psum_scatter(new_VD, 'fsdp', scatter_dimension=0, tiled=True)
      new_VD = dhead_VD + (jax.lax.psum(new_VD, 'data') if mesh.shape['data'] > 1 else new_VD)
    return jax.lax.psum(loss, ('data', 'fsdp')), metrics, dhidden_MD, new_VD

  if mesh.size == 1:
    return policy_loss.value_and_grads(
      hidden_MD, head_VD, bias_V, targets_M, support, aux, fn, spec, dhead_VD
    )
  V = head_VD.shape[0]
  head_VD, bias_V = _padded(head_VD, bias_V, mesh)
  dhead_VD = jnp.pad(dhead_VD, ((0, head_VD.shape[0] - V), (0, 0)))
  loss, metrics, dhidden_MD, dhead_VD = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(types.ROWS, HEAD, VOCABULARY, types.ROWS, types.ROWS, types.ROWS, HEAD),
    out_specs=(PartitionSpec(), types.ROWS, types.ROWS, HEAD),
    check_vma=False,
  )(hidden_MD, head_VD, bias_V, targets_M, support, aux, dhead_VD)
  return (loss, metrics), (dhidden_MD, dhead_VD[:V])


HEAD = PartitionSpec(('tensor', 'fsdp'))
VOCABULARY = PartitionSpec('tensor')


def _gather(head_VD, spec):
  """The part of the vocabulary that this device computes, in the dtype it is computed in."""
  return jax.lax.all_gather(head_VD.astype(spec.form[3]), 'fsdp', axis=0, tiled=True)


def _padded(head_VD, bias_V, mesh):
  """Rows that no token has, so that the vocabulary splits evenly."""
  missing = -head_VD.shape[0] % (mesh.shape['tensor'] * mesh.shape['fsdp'])
  bias_V = jnp.pad(bias_V, (0, missing), constant_values=policy_loss.OUTSIDE)
  return jnp.pad(head_VD, ((0, missing), (0, 0))), bias_V
