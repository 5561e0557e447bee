"""Causal attention of packed rows among themselves, by the platform's own kernel.

    out[b,h,t] = sum_s softmax_s(cap(scale q[b,h,t] . k[b,h',s])) v[b,h',s]        h' = h // (H / K)

over the s <= t of t's segment, at most window - 1 tokens back. No [T, T] array leaves the chip:

  splash  TPU: JAX's splash attention (arXiv 2205.14135, sparse masks), with segment ids, softcap
          and a backward kernel. Rows are padded to its blocks.
  cudnn   GPU: cuDNN's flash attention through JAX; bfloat16, no softcap. Segments become a mask.
  xla     everywhere: `attention`, which holds the weights [B, H, T, T].

Decoding against a cache is `attention` on every platform: one query per row reads the cache once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from reasonrl.kernels import attention

LANES = 128
BLOCK = 512  # tokens per block of queries and keys, where the row is that long
INTERPRET = False  # True: run splash attention without a TPU
CUDNN = 'cudnn'  # how JAX is asked for it; 'xla' computes the same without a GPU


def visible(segments_BT, window: int | None):
  """bool [B, T, T]: within a segment, not in the future, at most window - 1 tokens back."""
  at = jnp.arange(segments_BT.shape[1])
  back = at[:, None] - at[None, :]
  see = (back >= 0) if window is None else (back >= 0) & (back < window)
  return see[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


def self_attention(q_BHTC, k_BKTC, v_BKTC, segments_BT, window, scale, softcap, backend: str):
  """Attention within the segments of packed rows.

  Args:
    q_BHTC, k_BKTC, v_BKTC: H must be a multiple of K.
    segments_BT: int32; tokens see only their own segment.
    window: None, or the most tokens that one sees, itself included.
    scale: multiplies the scores.
    softcap: None, or c in c * tanh(score / c).
    backend: of BACKENDS.

  Returns:
    [B, H, T, C] in q's dtype.

  Raises:
    ValueError: the back end is unknown, or cannot do this.
  """
  if backend not in BACKENDS:
    raise ValueError(f'attention backend={backend!r} is not one of {", ".join(BACKENDS)}')
  return BACKENDS[backend](q_BHTC, k_BKTC, v_BKTC, segments_BT, window, scale, softcap)


def _xla(q_BHTC, k_BKTC, v_BKTC, segments_BT, window, scale, softcap):
  see_BTT = visible(segments_BT, window)
  return attention.attention(q_BHTC, k_BKTC, v_BKTC, see_BTT, scale, softcap)


def _splash(q_BHTC, k_BKTC, v_BKTC, segments_BT, window, scale, softcap):
  B, H, T, C = q_BHTC.shape
  K = k_BKTC.shape[1]
  # Rows to whole blocks, by tokens of segments that no token has; channels to what the chip loads.
  long, wide = -T % min(BLOCK, T + -T % LANES), -C % (LANES // 2)
  grow = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, long), (0, wide)))
  segments = jnp.pad(segments_BT, ((0, 0), (0, long)), constant_values=-1)
  q_BHTC = (q_BHTC.astype(jnp.float32) * scale).astype(q_BHTC.dtype)  # the kernel does not scale
  q_BKGTC = grow(q_BHTC).reshape(B, K, H // K, T + long, C + wide)
  kernel = _splash_kernel(H // K, T + long, window, softcap)

  def row(q_KGTC, k_KTC, v_KTC, segments_T):
    ids = splash.SegmentIds(segments_T, segments_T)
    return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q_KGTC, k_KTC, v_KTC)

  out = jax.vmap(row)(q_BKGTC, grow(k_BKTC), grow(v_BKTC), segments)
  return out.reshape(B, H, T + long, C + wide)[:, :, :T, :C].astype(q_BHTC.dtype)


def _splash_kernel(G: int, T: int, window, softcap):
  """For G query heads that share a key head, rows of T tokens."""
  mask = masks.CausalMask((T, T))
  if window is not None:
    mask = masks.LocalMask((T, T), (window - 1, 0), 0)
  block = min(BLOCK, T)
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,  # a kernel of its own: fused, dq would come in T / block parts
    block_kv_dq=block,
  )
  return splash.make_splash_mqa_single_device(
    masks.MultiHeadMask([mask] * G),
    block_sizes=sizes,
    attn_logits_soft_cap=softcap,
    interpret=INTERPRET,
  )


def _cudnn(q_BHTC, k_BKTC, v_BKTC, segments_BT, window, scale, softcap):
  if softcap is not None or q_BHTC.dtype != jnp.bfloat16:
    raise ValueError(
      f"attention backend='cudnn' takes bfloat16 and no softcap, not {q_BHTC.dtype} and "
      f'softcap={softcap}; xla does'
    )
  turn = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
  out = jax.nn.dot_product_attention(
    *(turn(q_BHTC), turn(k_BKTC), turn(v_BKTC)),
    mask=visible(segments_BT, window)[:, None],
    scale=scale,
    implementation=CUDNN,
  )
  return turn(out)


BACKENDS = {'xla': _xla, 'splash': _splash, 'cudnn': _cudnn}


def self_attention_ref(q_BHTC, k_BKTC, v_BKTC, segments_BT, window, scale, softcap):
  """The formula, from the materialised mask."""
  see_BTT = visible(segments_BT, window)
  return attention.attention_ref(q_BHTC, k_BKTC, v_BKTC, see_BTT, scale, softcap)


def cases():
  """(name, B, H, K, T, C, segments of each row, window, softcap)."""
  return [
    ('one segment', 1, 2, 2, 128, 64, (128,), None, None),
    ('packed, grouped, ragged', 2, 4, 2, 150, 64, (40, 70, 21), None, None),
    ('window', 1, 2, 1, 140, 64, (100, 40), 9, None),
    ('softcap, narrow head', 1, 2, 1, 130, 24, (60, 50), None, 5.0),
  ]
