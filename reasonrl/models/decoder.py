"""One decoder-only transformer whose switches cover the Llama family and its relatives.

1. Embed tokens, or take embeddings.
2. N blocks: norm, attention with rotary positions, norm, gated MLP; each adds to the stream.
3. A final norm. Logits are never formed here: the loss and the sampler take the hidden states and
   `head(params)`.

Parameters are a plain nested dict with one subtree per layer, whatever the platform; with
`scan_layers` they are stacked at trace time, for decoding before. Weights are [out, in].

Flax Linen is used for what is in a layer, and to name and initialise its parameters.
Left out on purpose: dropout and mutable collections.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from reasonrl import caches, ops, records
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


class _Block(nn.Module):
  """One layer; `cfg` is the Decoder.

  attend(q, k, v) is what its heads look at. Also returns k and v.
  """

  cfg: Any

  @nn.compact
  def __call__(self, x_BTD, attend, rotation):
    cfg = self.cfg
    norm = lambda name: _Norm(cfg, cfg.width, name=name)
    h = norm('attn_norm')(x_BTD)
    h, new = _Attention(cfg, name='attn')(h, attend, rotation)
    x_BTD = x_BTD + (norm('post_attn_norm')(h) if cfg.post_norms else h)
    h = _Mlp(cfg, name='mlp')(norm('mlp_norm')(x_BTD))
    return x_BTD + (norm('post_mlp_norm')(h) if cfg.post_norms else h), new


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
  """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

  cfg: Any

  @nn.compact
  def __call__(self, h_BTD, attend, rotation):
    cfg, (B, T, D) = self.cfg, h_BTD.shape
    H, K, C = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def project(heads, name):
      y = _Linear(cfg, heads * C, D, 1.0, cfg.qkv_bias, name=name)(h_BTD)
      return y.reshape(B, T, heads, C)

    if self.has_variable('params', 'qkv'):  # see `Decoder.fused`
      q, k, v = jnp.split(project(H + 2 * K, 'qkv'), (H, H + K), axis=2)
    else:
      q, k, v = project(H, 'q'), project(K, 'k'), project(K, 'v')
    if cfg.qk_norm:
      q, k = _Norm(cfg, C, name='q_norm')(q), _Norm(cfg, C, name='k_norm')(k)
    q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = attend(q, k, v).swapaxes(1, 2).reshape(B, T, H * C)
    return _Linear(cfg, D, H * C, cfg.residual_init, False, name='o')(out), (k, v)


class _Mlp(nn.Module):
  """down(activation(gate x) * up x)   (arXiv 2002.05202)."""

  cfg: Any

  @nn.compact
  def __call__(self, x):
    cfg, F = self.cfg, self.cfg.mlp_width
    project = lambda n, name: _Linear(cfg, n, cfg.width, 1.0, False, name=name)(x)
    if self.has_variable('params', 'gate_up'):  # see `Decoder.fused`
      gate, up = jnp.split(project(2 * F, 'gate_up'), 2, axis=-1)
    else:
      gate, up = project(F, 'gate'), project(F, 'up')
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
    (r'(attn/(qkv|[qkv])|mlp/(gate|up|gate_up))/weight', ('tensor',)),
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
    rope.check(self)
    if self.scan_layers and len({self._window(i) for i in range(self.num_layers)}) > 1:
      raise records.UserError(
        'model.scan_layers needs one attention window for all layers, but sliding_window='
        f'{self.sliding_window} leaves out every {self.sliding_window_pattern}th'
      )

  def init(self, key) -> dict:
    """Fresh parameters in `param_dtype`."""
    dtype = jnp.dtype(self.param_dtype)
    keys = jax.random.split(key, self.num_layers + 2)
    x = jnp.zeros((1, 1, self.width))
    attend = lambda q, k, v: q
    rotation = (jnp.ones((1, 1, 1, self.head_dim // 2)),) * 2
    table = lambda key, std: std * jax.random.normal(key, (self.vocab_size, self.width))
    params = {
      'embed': {'weight': table(keys[0], 0.02).astype(dtype)},
      'layers': {
        self._layer(i): _Block(self).init(keys[i + 2], x, attend, rotation)['params']
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

  def fused(self, params):
    """Parameters for decoding: what is multiplied by the same vector becomes one matrix.

    `hidden` takes either. Not for a mesh with a tensor axis, whose parts would mix q, k and v.
    """
    join = lambda *ws: jax.tree.map(lambda *x: jnp.concatenate(x), *ws)

    def layer(tree):
      attn, mlp = dict(tree['attn']), dict(tree['mlp'])
      attn['qkv'] = join(attn.pop('q'), attn.pop('k'), attn.pop('v'))
      mlp['gate_up'] = join(mlp.pop('gate'), mlp.pop('up'))
      return tree | {'attn': attn, 'mlp': mlp}

    return params | {'layers': {name: layer(tree) for name, tree in params['layers'].items()}}

  def stacked(self, params):
    """Parameters with one tree for all layers, as `lax.scan` takes them. `hidden` takes either."""
    return params | {'layers': self._stack(params['layers'])}

  def _stack(self, layers):
    each = (layers[self._layer(i)] for i in range(self.num_layers))
    return jax.tree.map(lambda *x: jnp.stack(x), *each)

  def init_cache(self, rows: int, slots: int, dtype=None) -> caches.Cache:
    """Without tokens. dtype None: the compute dtype; int8: quantised (see `caches`)."""
    shape = (rows, self.num_kv_heads, slots, self.head_dim)
    dtype = jnp.dtype(dtype or self.compute_dtype)
    return caches.empty(self.num_layers, self.scan_layers, *shape, dtype)

  def embed(self, params, tokens):
    """What stands for tokens at the input: [..., D] in the compute dtype."""
    dtype = jnp.dtype(self.compute_dtype)
    x = params['embed']['weight'][tokens].astype(dtype)
    return x * jnp.asarray(math.sqrt(self.width), dtype) if self.embed_scale else x

  def hidden(
    self, params, inputs, positions_BT, segments_BT, cache=None, *, prefixes_BT=None, mesh=None,
    fresh=False,
  ):  # fmt: skip
    """Final hidden states.

    Args:
      params: as from `init`, `fused` or `stacked`.
      inputs: tokens_BT (integers) or embeds_BTD, as `embed` gives them.
      positions_BT: int32, of a token in its sequence.
      segments_BT: int32, 0 = padding. Tokens see their own segment, and what it continues.
      cache: None, or what `init_cache` or an earlier call returned. With a cache a row is one
        sequence, its tokens go into the next slots, for which there must be room, and tokens of
        segment 0 are nobody's.
      prefixes_BT: as in `types.Batch`; None with a cache.
      mesh: of the arrays; None: one device.
      fresh: nothing is in the cache yet, so that tokens see one another alone.

    Returns:
      hidden_BTD (compute dtype), cache (None if none was given).
    """
    cache = None if cache is None else caches.note(cache, positions_BT, segments_BT)
    packed = ops.Packed(segments_BT, prefixes_BT, positions_BT)
    x = inputs.astype(jnp.dtype(self.compute_dtype))
    if jnp.issubdtype(inputs.dtype, jnp.integer):
      x = self.embed(params, inputs)

    def kind(window):  # what the layers of one window share
      rotation = rope.rotation(positions_BT, *self._frequencies(window))
      # Else a CPU computes it in every layer (before JAX 0.11.2 it does all the same).
      rotation = jax.lax.optimization_barrier(rotation)
      attend = self._attend(packed, window, cache, fresh, mesh)

      def block(weights, x, own, shared):
        look = functools.partial(attend, own=own, shared=shared)
        x, new = _Block(self).apply({'params': weights}, x, look, rotation)
        return x, None if cache is None else new

      return jax.checkpoint(block) if self.remat else block

    kinds = {window: kind(window) for window in {self._window(i) for i in range(self.num_layers)}}
    run = self._scanned if self.scan_layers else self._unrolled
    x, new = run(kinds, params['layers'], x, cache)
    # Written once all layers have read: earlier, the compiler for TPUs moves a layer's cache to
    # fast memory, writes it there and copies it back; the one for CPUs (JAX 0.10.2) copies each
    # cache, and takes barriers out before it finds what it may write in place. So the slot needs x.
    if cache is not None and not fresh:
      never = x[0, 0, 0] > jnp.inf  # not for NaN either, but no compiler concludes that
      cache = dataclasses.replace(cache, slot=jnp.where(never, 0, cache.slot))
    cache = None if cache is None else caches.write(cache, new)
    norm = params['final_norm']['scale']
    return rms_norm(x, norm, self.norm_eps, self.norm_plus_one), cache

  def _attend(self, packed: ops.Packed, window, cache, fresh: bool, mesh):
    """(q, k, v, own, shared) -> what the heads see."""
    scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
    form = (scale, self.attention_softcap)
    if cache is None or fresh:
      look = lambda q, k, v: ops.self_attention(q, k, v, packed, window, *form, mesh)
      return lambda q, k, v, own, shared: look(q, k, v)
    see = caches.visible(cache, packed.positions, packed.segments, window)
    return lambda q, k, v, own, shared: ops.decode_attention(
      q, k, v, own, shared, *see, *form, mesh
    )

  def _unrolled(self, kinds, layers, x, cache):
    new = []
    for i in range(self.num_layers):
      own = None if cache is None else cache.own[i]
      shared = None if cache is None or cache.shared is None else cache.shared[i]
      x, pair = kinds[self._window(i)](layers[self._layer(i)], x, own, shared)
      new.append(pair)
    return x, new

  def _scanned(self, kinds, layers, x, cache):
    """lax.scan over layers."""
    (block,) = kinds.values()  # one window for all: `__post_init__`
    layers = self._stack(layers) if self._layer(0) in layers else layers
    own, shared = (None, None) if cache is None else (cache.own, cache.shared)

    layer = lambda x, layer: block(layer[0], x, *layer[1:])
    return jax.lax.scan(layer, x, (layers, own, shared))

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
