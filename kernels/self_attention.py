"""Causal attention of packed rows among themselves, by the platform's own kernel.

    out[b,h,t] = sum_s softmax_s(cap(scale q[b,h,t] . k[b,h',s])) v[b,h',s]        h' = h // (H / K)

over the s <= t of t's segment, and of the one that it continues, at most window - 1 tokens back:

  splash  TPU: JAX's splash attention (arXiv 2205.14135, sparse masks), with segment ids, softcap
          and a backward kernel. Rows are padded to its blocks. No segment continues another.
  cudnn   GPU: cuDNN's flash attention through JAX; bfloat16, no softcap. JAX gives it segments as
          an added mask [B, 1, T, T]. It cannot be compiled without a GPU; it has run in prefills
          of 64 tokens on an H100, but nobody compared what it returns.
  xla     everywhere: `attention`, which holds the weights of the keys up to the end of a block.

Decoding against a cache is `decode_attention`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from reasonrl.kernels import attention

LANES = 128
BLOCK = 512  # tokens per block of queries and keys, where the row is that long
BLOCKS = 4  # of queries, at most, without such a kernel: each one is compiled
INTERPRET = False  # True: run splash attention without a TPU
CUDNN = 'cudnn'  # how JAX is asked for it; 'xla' computes the same without a GPU


class Packed(NamedTuple):
  """How sequences share rows; int32 [B, T] each."""

  segments: jax.Array
  # The segment that a token's own one continues, which lies before it in the row; its own, if none.
  # None: every segment stands alone.
  prefixes: jax.Array | None
  positions: jax.Array  # of a token in its sequence


def visible(packed: Packed, window: int | None):
  """bool [B, T, T]: of a sequence, not in the future, at most window - 1 tokens back."""
  at = jnp.arange(packed.segments.shape[1])
  same = lambda x: x[:, :, None] == packed.segments[:, None, :]
  see = same(packed.segments)
  if packed.prefixes is not None:
    see |= same(packed.prefixes)
  see &= at[None, :, None] >= at[None, None, :]
  if window is None:
    return see
  return see & (packed.positions[:, :, None] - packed.positions[:, None, :] < window)


def self_attention(q_BHTC, k_BKTC, v_BKTC, packed: Packed, window, scale, softcap, backend: str):
  """Attention within the sequences of packed rows.

  Args:
    q_BHTC, k_BKTC, v_BKTC: H must be a multiple of K.
    packed: what is a sequence; tokens see only their own one.
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
  return BACKENDS[backend](q_BHTC, k_BKTC, v_BKTC, packed, window, scale, softcap)


def _xla(q_BHTC, k_BKTC, v_BKTC, packed, window, scale, softcap):
  """Blocks of queries, each with the keys up to its end: four take 5/8 of the work of one."""
  see_BTT, T = visible(packed, window), q_BHTC.shape[2]
  size = max(LANES, 16 * -(-T // (16 * BLOCKS)))
  out = []
  for start in range(0, T, size):
    end = min(start + size, T)
    keys = k_BKTC[:, :, :end], v_BKTC[:, :, :end], see_BTT[:, start:end, :end]
    out.append(attention.attention(q_BHTC[:, :, start:end], *keys, scale, softcap))
  return jnp.concatenate(out, axis=2)


def _splash(q_BHTC, k_BKTC, v_BKTC, packed, window, scale, softcap):
  if packed.prefixes is not None:
    raise ValueError("attention backend='splash' has no segment that continues another; xla has")
  B, H, T, C = q_BHTC.shape
  K = k_BKTC.shape[1]
  # Rows to whole blocks, by padding; channels to what the chip loads.
  long, wide = -T % min(BLOCK, T + -T % LANES), -C % (LANES // 2)
  grow = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, long), (0, wide)))
  segments = jnp.pad(packed.segments, ((0, 0), (0, long)))
  # The kernel does not scale. One that is no power of two rounds q once more.
  q_BHTC = (q_BHTC.astype(jnp.float32) * scale).astype(q_BHTC.dtype)
  q_BKGTC = grow(q_BHTC).reshape(B, K, H // K, T + long, C + wide)
  kernel = _splash_kernel(H // K, T + long, window, softcap, INTERPRET)

  def row(q_KGTC, k_KTC, v_KTC, segments_T):
    ids = splash.SegmentIds(segments_T, segments_T)
    return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q_KGTC, k_KTC, v_KTC)

  out = jax.vmap(row)(q_BKGTC, grow(k_BKTC), grow(v_BKTC), segments)
  return out.reshape(B, H, T + long, C + wide)[:, :, :T, :C].astype(q_BHTC.dtype)


@functools.lru_cache(maxsize=16)  # sorting out which blocks of a long mask are empty takes a while
def _splash_kernel(G: int, T: int, window, softcap, interpret: bool):
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
  with jax.ensure_compile_time_eval():  # its tables are constants of whichever program asks
    return splash.make_splash_mqa_single_device(
      masks.MultiHeadMask([mask] * G),
      block_sizes=sizes,
      attn_logits_soft_cap=softcap,
      interpret=interpret,
    )


def _cudnn(q_BHTC, k_BKTC, v_BKTC, packed, window, scale, softcap):
  if softcap is not None or q_BHTC.dtype != jnp.bfloat16:
    raise ValueError(
      f"attention backend='cudnn' takes bfloat16 and no softcap, not {q_BHTC.dtype} and "
      f'softcap={softcap}; xla does'
    )
  T = q_BHTC.shape[2]
  odd = T % 2  # which it does not train on
  turn = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, odd), (0, 0), (0, 0)))
  out = jax.nn.dot_product_attention(
    *(turn(q_BHTC), turn(k_BKTC), turn(v_BKTC)),
    mask=visible(jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, odd))), packed), window)[:, None],
    scale=scale,
    is_causal=True,  # the mask says so too, but this spares the work
    implementation=CUDNN,
  )
  return out[:, :T].swapaxes(1, 2)


BACKENDS = {'xla': _xla, 'splash': _splash, 'cudnn': _cudnn}


def self_attention_ref(q_BHTC, k_BKTC, v_BKTC, packed, window, scale, softcap):
  """The formula, from the materialised mask."""
  see_BTT = visible(packed, window)
  return attention.attention_ref(q_BHTC, k_BKTC, v_BKTC, see_BTT, scale, softcap)


def cases():
  """(name, B, H, K, T, C, segments of each row, window, softcap)."""
  return [
    ('one segment', 1, 2, 2, 128, 64, (128,), None, None),
    ('packed, grouped, ragged', 2, 4, 2, 150, 64, (40, 70, 21), None, None),
    ('window', 1, 2, 1, 141, 64, (100, 40), 9, None),
    ('softcap, narrow head', 1, 2, 1, 130, 24, (60, 50), None, 5.0),
    ('four blocks', 1, 2, 1, 530, 16, (300, 150, 60), None, None),
  ]
