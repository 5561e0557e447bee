"""One decoder-only transformer whose switches cover the Llama family and its relatives.

1. Embed tokens, or take embeddings.
2. N blocks: norm, attention with rotary positions, norm, gated MLP; each adds to the stream.
3. A final norm. Logits are never formed here: the loss and the sampler take the hidden states and
   `head(params)`.

Parameters are a plain nested dict with one subtree per layer, whatever the platform; with
`scan_layers` they are stacked at trace time. Weights are [out, in].

Flax Linen is used for what is in a layer, and to name and initialise its parameters.
Left out on purpose: dropout and mutable collections.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from reasonrl import ops, records
from reasonrl.models import rope

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}


def rms_norm(x, scale, eps: float, plus_one: bool):
  """x / sqrt(mean(x^2) + eps) * scale (or 1 + scale), in float32 (arXiv 1910.07467)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  scale = scale.astype(jnp.float32) + (1.0 if plus_one else 0.0)
  return (x32 * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(x.dtype)


def visible_slots(positions_BT, slots: int, window: int | None):
  """bool [B, T, S] against a cache whose slot s holds the token at position s."""
  slot = jnp.arange(slots)[None, None, :]
  see = slot <= positions_BT[:, :, None]
  if window is not None:
    see &= positions_BT[:, :, None] - slot < window
  return see


def write_cache(cache_BKSC, new_BKTC, positions_BT, segments_BT):
  """Put token t of row b into slot positions[b, t]; segment 0 is not written."""
  if new_BKTC.shape[2] == 1:
    # One token per row: in place on every platform. A finished row rewrites its last token's slot.
    put = lambda cache, new, slot: jax.lax.dynamic_update_slice(cache, new, (0, slot, 0))
    return jax.vmap(put)(cache_BKSC, new_BKTC, positions_BT[:, 0])
  slots = jnp.where(segments_BT > 0, positions_BT, cache_BKSC.shape[2])
  put = lambda cache, new, slot: cache.at[:, slot].set(new, mode='drop')
  return jax.vmap(put)(cache_BKSC, new_BKTC, slots)


class _Block(nn.Module):
  """One layer; `cfg` is the Decoder, attend(q, k, v, cache) what its heads look at."""

  cfg: Any

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segments_BT, attend, rotation, cache):
    cfg = self.cfg
    norm = lambda name: _Norm(cfg, cfg.width, name=name)
    h = norm('attn_norm')(x_BTD)
    attention = _Attention(cfg, name='attn')
    h, cache = attention(h, positions_BT, segments_BT, attend, rotation, cache)
    x_BTD = x_BTD + (norm('post_attn_norm')(h) if cfg.post_norms else h)
    h = _Mlp(cfg, name='mlp')(norm('mlp_norm')(x_BTD))
    return x_BTD + (norm('post_mlp_norm')(h) if cfg.post_norms else h), cache


class _Linear(nn.Module):
  cfg: Any
  features: int
  inputs: int
  gain: float
  bias: bool

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    init = nn.initializers.normal(self.gain * self.inputs**-0.5)
    weight = self.param('weight', init, (self.features, self.inputs), jnp.dtype(cfg.param_dtype))
    y = ops.dense(x, weight, jnp.dtype(cfg.compute_dtype))
    if self.bias:
      b = self.param('bias', nn.initializers.zeros, (self.features,), jnp.dtype(cfg.param_dtype))
      y = y + jnp.expand_dims(b.astype(y.dtype), tuple(range(y.ndim - 1)))
    return y


class _Norm(nn.Module):
  cfg: Any
  size: int

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    init = nn.initializers.zeros if cfg.norm_plus_one else nn.initializers.ones
    scale = self.param('scale', init, (self.size,), jnp.dtype(cfg.param_dtype))
    return rms_norm(x, scale, cfg.norm_eps, cfg.norm_plus_one)


class _Attention(nn.Module):
  """Grouped-query attention (arXiv 2305.13245) with rotary positions and an optional cache."""

  cfg: Any

  @nn.compact
  def __call__(self, h_BTD, positions_BT, segments_BT, attend, rotation, cache):
    cfg, (B, T, D) = self.cfg, h_BTD.shape
    H, K, C = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    linear = lambda n, name: _Linear(cfg, n * C, D, 1.0, cfg.qkv_bias, name=name)
    q = linear(H, 'q')(h_BTD).reshape(B, T, H, C)
    k = linear(K, 'k')(h_BTD).reshape(B, T, K, C)
    v = linear(K, 'v')(h_BTD).reshape(B, T, K, C)
    if cfg.qk_norm:
      q, k = _Norm(cfg, C, name='q_norm')(q), _Norm(cfg, C, name='k_norm')(k)
    q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if cache is not None:
      cache = tuple(
        write_cache(old, new, positions_BT, segments_BT)
        for old, new in zip(cache, (k, v), strict=True)
      )
    out = attend(q, k, v, cache).swapaxes(1, 2).reshape(B, T, H * C)
    return _Linear(cfg, D, H * C, cfg.residual_init, False, name='o')(out), cache


class _Mlp(nn.Module):
  """down(activation(gate x) * up x)   (arXiv 2002.05202)."""

  cfg: Any

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    gate = _Linear(cfg, cfg.mlp_width, cfg.width, 1.0, False, name='gate')(x)
    up = _Linear(cfg, cfg.mlp_width, cfg.width, 1.0, False, name='up')(x)
    h = ACTIVATIONS[cfg.activation](gate) * up
    return _Linear(cfg, cfg.width, cfg.mlp_width, cfg.residual_init, False, name='down')(h)


@dataclasses.dataclass(frozen=True)
class Decoder:
  """The switches. Which family sets which: see `configs/common.py`."""

  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  activation: str
  qkv_bias: bool
  qk_norm: bool
  norm_plus_one: bool
  post_norms: bool
  embed_scale: bool  # multiply embeddings by sqrt(width)
  attention_scale: float | None  # None: head_dim ** -0.5
  attention_softcap: float | None
  final_softcap: float | None
  sliding_window: int | None
  sliding_window_pattern: int  # every n-th layer sees everything; 0: every layer is windowed
  rope_theta: float
  rope_scaling: str
  rope_factor: float | None
  rope_original_max_position: int | None
  rope_low_freq_factor: float
  rope_high_freq_factor: float
  rope_beta_fast: float
  rope_beta_slow: float
  rope_attention_factor: float | None  # None: 0.1 ln(rope_factor) + 1 for 'yarn', else 1
  rope_local_theta: float | None  # of windowed layers, never scaled; None: as all others
  tied_embeddings: bool
  norm_eps: float
  max_position: int
  scan_layers: bool
  remat: bool
  param_dtype: str
  compute_dtype: str

  logit_scale = 1.0
  # Output matrices shrink with depth so that the residual stream's variance does not grow with it.
  residual_init = property(lambda self: (2 * self.num_layers) ** -0.5)

  # The vocabulary is split, the width is not: a lookup in a table split over the width hands that
  # split to the activations, and every product after it sums them over fsdp.
  sharding_rules = (
    (r'embed/weight|heads/lm/weight', (('tensor', 'fsdp'),)),
    (r'(attn/[qkv]|mlp/gate|mlp/up)/weight', ('tensor', 'fsdp')),
    (r'(attn/o|mlp/down)/weight', ('fsdp', 'tensor')),
    (r'bias|scale', ()),
  )
  # While decoding, weights are read once per token: a copy gathered over fsdp once per rollout.
  decode_sharding_rules = (
    (r'embed/weight|heads/lm/weight', ('tensor',)),
    (r'(attn/[qkv]|mlp/gate|mlp/up)/weight', ('tensor',)),
    (r'(attn/o|mlp/down)/weight', (None, 'tensor')),
    (r'bias|scale', ()),
  )

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise records.UserError(
        f'model.activation={self.activation!r} is not one of {sorted(ACTIVATIONS)}'
      )
    if self.num_heads % self.num_kv_heads:
      raise records.UserError(
        f'model.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}'
      )
    for name in ('param_dtype', 'compute_dtype'):
      if getattr(self, name) not in ('float32', 'bfloat16'):
        raise records.UserError(
          f"model.{name}={getattr(self, name)!r} is not one of 'float32', 'bfloat16'"
        )
    if self.head_dim % 2:
      raise records.UserError(
        f'model.head_dim={self.head_dim} is odd, but rotary positions turn pairs of channels'
      )
    if self.sliding_window is not None and self.sliding_window < 1:
      raise records.UserError(f'model.sliding_window={self.sliding_window} is not None or >= 1')
    self._check_rope()
    if self.scan_layers and len({self._window(i) for i in range(self.num_layers)}) > 1:
      raise records.UserError(
        'model.scan_layers needs one attention window for all layers, but sliding_window='
        f'{self.sliding_window} leaves out every {self.sliding_window_pattern}th'
      )

  def _check_rope(self):
    if self.rope_scaling not in rope.SCALINGS:
      raise records.UserError(
        f'model.rope_scaling={self.rope_scaling!r} is not one of {", ".join(rope.SCALINGS)}'
      )
    _, fields = rope.SCALINGS[self.rope_scaling]
    for name in ('rope_factor', 'rope_original_max_position'):
      value, wanted = getattr(self, name), name in fields
      if (value is None) == wanted or (wanted and value < 1):
        raise records.UserError(
          f'model.rope_scaling={self.rope_scaling!r} takes {name}='
          f'{"a number >= 1" if wanted else None}, not {value}'
        )
    for low, high in (
      ('rope_low_freq_factor', 'rope_high_freq_factor'),
      ('rope_beta_slow', 'rope_beta_fast'),
    ):
      if not 0 < getattr(self, low) < getattr(self, high):
        raise records.UserError(
          f'model.{low}={getattr(self, low)} is not between 0 and {high}={getattr(self, high)}'
        )
    if self.rope_local_theta is not None and self.sliding_window is None:
      raise records.UserError(
        f'model.rope_local_theta={self.rope_local_theta} is of windowed layers, but '
        'sliding_window=None'
      )

  def init(self, key) -> dict:
    """Fresh parameters in `param_dtype`."""
    dtype = jnp.dtype(self.param_dtype)
    keys = jax.random.split(key, self.num_layers + 2)
    x, ids = jnp.zeros((1, 1, self.width)), jnp.zeros((1, 1), jnp.int32)
    attend, rotation = lambda q, k, v, cache: q, (jnp.ones((1, 1, 1, self.head_dim // 2)),) * 2
    table = lambda key, std: std * jax.random.normal(key, (self.vocab_size, self.width))
    params = {
      'embed': {'weight': table(keys[0], 0.02).astype(dtype)},
      'layers': {
        self._layer(i): _Block(self).init(keys[i + 2], x, ids, ids, attend, rotation, None)[
          'params'
        ]
        for i in range(self.num_layers)
      },
      'final_norm': _Norm(self, self.width).init(keys[0], x)['params'],
      'heads': {},
    }
    if not self.tied_embeddings:
      params['heads']['lm'] = {'weight': table(keys[1], self.width**-0.5).astype(dtype)}
    return params

  def head(self, params):
    """Output matrix W_VD."""
    holder = params['embed'] if self.tied_embeddings else params['heads']['lm']
    return holder['weight']

  def with_head(self, tree, head_VD):
    """A tree of the parameters' structure with this in the place of the output matrix."""
    if self.tied_embeddings:
      return tree | {'embed': tree['embed'] | {'weight': head_VD}}
    return tree | {'heads': tree['heads'] | {'lm': {'weight': head_VD}}}

  def init_cache(self, rows: int, size: int):
    """Zeroed keys and values: ([B,K,S,C], [B,K,S,C]) per layer; stacked on axis 0 if scanned."""
    shape = (rows, self.num_kv_heads, size, self.head_dim)
    dtype = jnp.dtype(self.compute_dtype)
    if self.scan_layers:
      return tuple(jnp.zeros((self.num_layers, *shape), dtype) for _ in range(2))
    zeros = lambda: jnp.zeros(shape, dtype)
    return tuple((zeros(), zeros()) for _ in range(self.num_layers))

  def hidden(
    self, params, inputs, positions_BT, segments_BT, cache=None, *, mesh=None, fresh=False
  ):
    """Final hidden states.

    Args:
      params: as from `init`.
      inputs: tokens_BT (integers) or embeds_BTD.
      positions_BT: int32, restart at 0 in every segment; with a cache, the slots to write.
      segments_BT: int32, 0 = padding. Tokens see only their own segment.
      cache: None, or what `init_cache` or an earlier call returned. With a cache a row is one
        sequence, slot s holds position s, and segment 0 is not written.
      mesh: of the arrays; None: one device.
      fresh: nothing is in the cache yet, so that tokens see one another alone.

    Returns:
      hidden_BTD (compute dtype), cache (None if none was given).
    """
    dtype = jnp.dtype(self.compute_dtype)
    if jnp.issubdtype(inputs.dtype, jnp.integer):
      x = params['embed']['weight'][inputs].astype(dtype)
      if self.embed_scale:
        x = x * jnp.asarray(math.sqrt(self.width), dtype)
    else:
      x = inputs.astype(dtype)

    def kind(window):  # what the layers of one window share
      rotation = rope.rotation(positions_BT, *self._frequencies(window))
      slots = None if cache is None or fresh else jax.tree.leaves(cache)[0].shape[-2]
      attend = self._attend(positions_BT, segments_BT, window, slots, mesh)
      block = lambda weights, x, cache: _Block(self).apply(
        {'params': weights}, x, positions_BT, segments_BT, attend, rotation, cache
      )
      return jax.checkpoint(block) if self.remat else block

    kinds = {window: kind(window) for window in {self._window(i) for i in range(self.num_layers)}}
    run = self._scanned if self.scan_layers else self._unrolled
    x, cache = run(kinds, params['layers'], x, cache)
    norm = params['final_norm']['scale']
    return rms_norm(x, norm, self.norm_eps, self.norm_plus_one), cache

  def _attend(self, positions_BT, segments_BT, window, slots: int | None, mesh):
    """(q, k, v, cache) -> what the heads see: their own row, or a cache of so many slots."""
    scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
    form = (scale, self.attention_softcap)
    if slots is None:
      return lambda q, k, v, _: ops.self_attention(q, k, v, segments_BT, window, *form, mesh)
    see_BTS = visible_slots(positions_BT, slots, window)
    return lambda q, k, v, cache: ops.attention(q, *cache, see_BTS, *form)

  def _unrolled(self, kinds, layers, x, cache):
    new = []
    for i in range(self.num_layers):
      old = None if cache is None else cache[i]
      x, kv = kinds[self._window(i)](layers[self._layer(i)], x, old)
      new.append(kv)
    return x, None if cache is None else tuple(new)

  def _scanned(self, kinds, layers, x, cache):
    """lax.scan over stacked layers; the cache rides in the carry (as xs/ys it would be copied)."""
    (block,) = kinds.values()  # one window for all: `__post_init__`
    stacked = jax.tree.map(
      lambda *leaves: jnp.stack(leaves), *(layers[self._layer(i)] for i in range(self.num_layers))
    )

    def body(carry, layer):
      x, cache = carry
      i, weights = layer
      old = None
      if cache is not None:
        old = tuple(jax.lax.dynamic_index_in_dim(c, i, keepdims=False) for c in cache)
      x, new = block(weights, x, old)
      if cache is not None:
        update = jax.lax.dynamic_update_index_in_dim
        cache = tuple(update(c, n, i, 0) for c, n in zip(cache, new, strict=True))
      return (x, cache), None

    (x, cache), _ = jax.lax.scan(body, (x, cache), (jnp.arange(self.num_layers), stacked))
    return x, cache

  def _window(self, layer: int) -> int | None:
    n = self.sliding_window_pattern
    return None if n and (layer + 1) % n == 0 else self.sliding_window

  def _frequencies(self, window: int | None):
    """Rotary frequencies [C/2] and amplitude of a layer with this window."""
    if window is not None and self.rope_local_theta is not None:
      return rope.default(self.rope_local_theta, self.head_dim), 1.0
    scaling, fields = rope.SCALINGS[self.rope_scaling]
    given = (getattr(self, name) for name in fields)
    amplitude = self.rope_attention_factor
    if amplitude is None:
      amplitude = rope.yarn_amplitude(self.rope_factor) if self.rope_scaling == 'yarn' else 1.0
    return scaling(self.rope_theta, self.head_dim, *given), amplitude

  @staticmethod
  def _layer(i: int) -> str:
    return f'{i:02d}'
