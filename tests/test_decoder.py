"""The decoder against a NumPy forward written for reading; packing, causality, cache, switches.

`-m hf`: rotary scalings against transformers (pip install torch transformers).
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import rotary_amplitude, rotary_frequency

from reasonrl import records
from reasonrl.configs import common
from reasonrl.models import decoder

TINY = {
  'vocab_size': 19,
  'num_layers': 2,
  'width': 12,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 4,
  'mlp_width': 20,
  'max_position': 32,
}


def make(**changes) -> decoder.Decoder:
  """A Llama-type decoder of a few hundred parameters, with some switches changed."""
  fields = common.model('nano').to_dict() | TINY | changes
  return decoder.Decoder(**{k: v for k, v in fields.items() if k not in ('kind', 'weights')})


@functools.cache
def parameters(model):
  """Random values for every parameter: at initialisation biases are 0 and norms are 1."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), x.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, inputs, positions_BT, segments_BT, cache=None):
  return model.hidden(params, inputs, positions_BT, segments_BT, cache)


def tokens(*shape):
  return np.random.default_rng(1).integers(0, TINY['vocab_size'], shape).astype(np.int32)


def whole(tokens_BT, length_B=None):
  """positions, segments of one right-padded sequence per row."""
  B, T = tokens_BT.shape
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  length_B = np.full(B, T) if length_B is None else np.asarray(length_B)
  return positions, (positions < length_B[:, None]).astype(np.int32)


def close(got, want, tolerance=1e-5):
  np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ the oracle


def oracle(model, params, tokens_T):
  """Final hidden states of one sequence: float64, one head and one query at a time.

  Llama with every switch of `decoder.Decoder` spelled out where it applies.
  """
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  C = model.head_dim

  def norm(x, scale):
    scale = scale + 1.0 if model.norm_plus_one else scale
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + model.norm_eps) * scale

  def rotate(x_C, position, window):
    out = np.empty(C)
    for i in range(C // 2):
      angle = position * rotary_frequency(model, i, window)
      a, b = x_C[i], x_C[i + C // 2]
      out[i] = a * math.cos(angle) - b * math.sin(angle)
      out[i + C // 2] = b * math.cos(angle) + a * math.sin(angle)
    return rotary_amplitude(model, window) * out

  def activation(x):
    if model.activation == 'silu':
      return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

  def attend(layer, h_TD, window):
    def project(name, head):
      rows = slice(head * C, (head + 1) * C)
      x_TC = h_TD @ layer[name]['weight'][rows].T
      if model.qkv_bias:
        x_TC = x_TC + layer[name]['bias'][rows]
      if model.qk_norm and name != 'v':
        x_TC = norm(x_TC, layer[f'{name}_norm']['scale'])
      if name == 'v':
        return x_TC
      return np.stack([rotate(x, t, window) for t, x in enumerate(x_TC)])

    heads = []
    for h in range(model.num_heads):
      kv = h // (model.num_heads // model.num_kv_heads)
      q_TC, k_TC, v_TC = project('q', h), project('k', kv), project('v', kv)
      out = []
      for i in range(len(h_TD)):
        first = 0 if window is None else max(0, i - window + 1)  # i - j < window
        scale = C**-0.5 if model.attention_scale is None else model.attention_scale
        score = k_TC[first : i + 1] @ q_TC[i] * scale
        if model.attention_softcap is not None:
          score = model.attention_softcap * np.tanh(score / model.attention_softcap)
        weight = np.exp(score - score.max())
        out.append(weight @ v_TC[first : i + 1] / weight.sum())
      heads.append(np.stack(out))
    return np.concatenate(heads, axis=1) @ layer['o']['weight'].T

  def mlp(layer, h_TD):
    gate, up = h_TD @ layer['gate']['weight'].T, h_TD @ layer['up']['weight'].T
    return activation(gate) * up @ layer['down']['weight'].T

  x = p['embed']['weight'][tokens_T]
  if model.embed_scale:
    x = x * math.sqrt(model.width)
  for i in range(model.num_layers):
    layer = p['layers'][f'{i:02d}']
    everything = model.sliding_window_pattern and (i + 1) % model.sliding_window_pattern == 0
    window = None if everything else model.sliding_window
    post = lambda name, h: norm(h, layer[name]['scale']) if model.post_norms else h  # noqa: B023
    h = attend(layer['attn'], norm(x, layer['attn_norm']['scale']), window)
    x = x + post('post_attn_norm', h)
    x = x + post('post_mlp_norm', mlp(layer['mlp'], norm(x, layer['mlp_norm']['scale'])))
  return norm(x, p['final_norm']['scale'])


SWITCHES = {
  'rope_theta': {'rope_theta': 10.0},
  'norm_eps': {'norm_eps': 0.1},
  'qkv_bias': {'qkv_bias': True},
  'qk_norm': {'qk_norm': True},
  'norm_plus_one': {'norm_plus_one': True},
  'post_norms': {'post_norms': True},
  'embed_scale': {'embed_scale': True},
  'activation': {'activation': 'gelu_tanh'},
  'attention_scale': {'attention_scale': 0.1},
  'attention_softcap': {'attention_softcap': 0.5},
  'sliding_window': {'sliding_window': 3},
  'sliding_window_pattern': {'sliding_window': 1, 'sliding_window_pattern': 2, 'num_layers': 3},
}
# Four pairs of channels, 40 tokens: 6.4, 2.4, 0.9 and 0.3 turns.
FOUR_PAIRS = {'head_dim': 8, 'rope_theta': 50.0}
YARN = {
  **{'rope_scaling': 'yarn', 'rope_factor': 4.0, 'rope_original_max_position': 40},
  **{'rope_beta_fast': 2.0, 'rope_beta_slow': 0.5},
}
LOCAL = {'rope_local_theta': 5.0, 'sliding_window': 30, 'sliding_window_pattern': 2}
ROPES = {
  'linear': {'rope_scaling': 'linear', 'rope_factor': 8.0},
  'llama3': {'rope_scaling': 'llama3', 'rope_factor': 8.0, 'rope_original_max_position': 40},
  'yarn': YARN,
  'attention factor': YARN | {'rope_attention_factor': 0.7},
  'local': LOCAL,
  'local and linear': LOCAL | {'rope_scaling': 'linear', 'rope_factor': 8.0},
  'local and yarn': LOCAL | YARN,
}
ALL_SWITCHES = dict(itertools.chain(*(changes.items() for changes in SWITCHES.values())))
ALL_SWITCHES |= YARN | {'rope_local_theta': 5.0}


def test_a_llama_type_model_is_the_oracle():
  model = make()
  tokens_BT = tokens(2, 7)
  got, _ = hidden(model, parameters(model), tokens_BT, *whole(tokens_BT))
  close(got, [oracle(model, parameters(model), row) for row in tokens_BT])


@pytest.mark.parametrize('changes', SWITCHES.values(), ids=list(SWITCHES))
def test_each_switch_is_the_oracle_and_changes_the_result(changes):
  model = make(**{'num_layers': 1} | changes)
  params, tokens_BT = parameters(model), tokens(1, 7)
  got, _ = hidden(model, params, tokens_BT, *whole(tokens_BT))
  close(got[0], oracle(model, params, tokens_BT[0]))
  *_, switch = [name for name in changes if name != 'num_layers']
  off = dataclasses.replace(model, **{switch: getattr(make(), switch)})
  off = oracle(off, params, tokens_BT[0])
  assert np.abs(got[0] - off).max() > 1e-2


@pytest.mark.parametrize('changes', ROPES.values(), ids=list(ROPES))
def test_each_rope_is_the_oracle_and_changes_the_result(changes):
  windows = {k: v for k, v in changes.items() if not k.startswith('rope')}
  model, plain = make(**FOUR_PAIRS | changes), make(**FOUR_PAIRS | windows)
  params, tokens_BT = parameters(plain), tokens(1, 48)
  got, _ = hidden(model, params, tokens_BT, *whole(tokens_BT))
  close(got[0], oracle(model, params, tokens_BT[0]), 1e-4)
  assert np.abs(got[0] - oracle(plain, params, tokens_BT[0])).max() > 1e-2


def test_all_switches_together_are_the_oracle():
  model = make(**ALL_SWITCHES)
  tokens_BT = tokens(1, 7)
  got, _ = hidden(model, parameters(model), tokens_BT, *whole(tokens_BT))
  close(got[0], oracle(model, parameters(model), tokens_BT[0]))


def test_bfloat16_is_near_float32():
  model = make(compute_dtype='bfloat16')
  tokens_BT = tokens(1, 7)
  got, _ = hidden(model, parameters(make()), tokens_BT, *whole(tokens_BT))
  assert got.dtype == jnp.bfloat16
  want = oracle(model, parameters(make()), tokens_BT[0])
  assert np.abs(np.asarray(got[0], np.float64) - want).max() < 0.1


# ------------------------------------------------------------------------------------ parts


def test_rms_norm_by_hand():
  # Mean square of (3, 4) is 12.5; with eps 3.5 the divisor is 4.
  x, scale = jnp.asarray([3.0, 4.0]), jnp.asarray([2.0, 1.0])
  assert decoder.rms_norm(x, scale, 3.5, False).tolist() == [1.5, 1.0]
  assert decoder.rms_norm(x, scale, 3.5, True).tolist() == [2.25, 2.0]


def test_heads():
  tied, untied = make(), make(tied_embeddings=False)
  assert tied.head(parameters(tied)) is parameters(tied)['embed']['weight']
  params = parameters(untied)
  assert untied.head(params) is params['heads']['lm']['weight']
  assert params['heads']['lm']['weight'].shape == (19, 12)
  assert parameters(tied)['heads'] == {}


def test_parameter_paths_and_shapes():
  """Names and [out, in] shapes are the checkpoint format: a change here breaks saved runs."""
  model = make(**ALL_SWITCHES | {'num_layers': 1})
  params = jax.eval_shape(model.init, jax.random.key(0))
  found = {
    '/'.join(key.key for key in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  assert found == {
    'embed/weight': (19, 12),
    'final_norm/scale': (12,),
    'layers/00/attn_norm/scale': (12,),
    'layers/00/attn/q/weight': (16, 12),
    'layers/00/attn/q/bias': (16,),
    'layers/00/attn/k/weight': (8, 12),
    'layers/00/attn/k/bias': (8,),
    'layers/00/attn/v/weight': (8, 12),
    'layers/00/attn/v/bias': (8,),
    'layers/00/attn/q_norm/scale': (4,),
    'layers/00/attn/k_norm/scale': (4,),
    'layers/00/attn/o/weight': (12, 16),
    'layers/00/post_attn_norm/scale': (12,),
    'layers/00/mlp_norm/scale': (12,),
    'layers/00/mlp/gate/weight': (20, 12),
    'layers/00/mlp/up/weight': (20, 12),
    'layers/00/mlp/down/weight': (12, 20),
    'layers/00/post_mlp_norm/scale': (12,),
  }


def test_initial_values():
  model = make(width=64, mlp_width=128, vocab_size=200, param_dtype='bfloat16')
  params = jax.jit(model.init)(jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  ratio = lambda x, std: np.std(np.asarray(x, np.float64)) / std
  layer = params['layers']['00']
  ratios = (
    ratio(params['embed']['weight'], 0.02),
    ratio(layer['mlp']['gate']['weight'], 64**-0.5),
    ratio(layer['mlp']['down']['weight'], 128**-0.5 / 2),  # 2 layers: (2 * 2) ** -0.5
    ratio(layer['attn']['o']['weight'], 16**-0.5 / 2),
  )
  close(ratios, np.ones(4), 0.05)
  assert (params['final_norm']['scale'] == 1).all()
  assert not np.array_equal(layer['mlp']['gate']['weight'], layer['mlp']['up']['weight'])
  zero = jax.jit(make(norm_plus_one=True).init)(jax.random.key(0))
  assert not zero['final_norm']['scale'].any()


# ------------------------------------------------------------------------------------ rows


LENGTHS = (5, 7, 3)


def packed():
  """Three sequences in one row of 18, the last three positions padding."""
  row, positions, segments = tokens(1, 18), np.zeros((1, 18), np.int32), np.zeros((1, 18), np.int32)
  starts = np.cumsum((0, *LENGTHS))
  for i, n in enumerate(LENGTHS):
    span = slice(starts[i], starts[i] + n)
    positions[0, span], segments[0, span] = np.arange(n), i + 1
  return row, positions, segments, starts


@pytest.mark.parametrize('changes', [{}, {'sliding_window': 3}], ids=['full', 'window'])
def test_packing_changes_nothing(changes):
  """Hidden states and log-probabilities of packed sequences are those of separate rows."""
  model = make(**changes)
  params = parameters(model)
  row, positions, segments, starts = packed()
  one, _ = hidden(model, params, row, positions, segments)
  rows = np.zeros((3, 8), np.int32)
  for i, n in enumerate(LENGTHS):
    rows[i, :n] = row[0, starts[i] : starts[i] + n]
  many, _ = hidden(model, params, rows, *whole(rows, LENGTHS))
  for i, n in enumerate(LENGTHS):
    span = slice(starts[i], starts[i] + n)
    close(one[0, span], many[i, :n])
    logp = [jax.nn.log_softmax(h @ model.head(params).T) for h in (one[0, span], many[i, :n])]
    close(*logp)


@functools.partial(jax.jit, static_argnums=0)
def influence(model, params, embeds_TD, positions_BT, segments_BT):
  """[t, s]: the size of d hidden_t / d embedding_s."""

  def out(embeds_TD):
    return model.hidden(params, embeds_TD[None], positions_BT, segments_BT, None)[0][0]

  return jnp.abs(jax.jacrev(out)(embeds_TD)).sum((1, 3))


@pytest.mark.parametrize(
  'changes, reach',
  [
    ({}, None),
    ({'sliding_window': 3, 'num_layers': 1}, 3),
    ({'sliding_window': 3}, 5),  # two layers: 2 tokens back, twice
    ({'sliding_window': 1}, 1),
    ({'sliding_window': 1, 'sliding_window_pattern': 2}, None),
    ({'scan_layers': True, 'remat': True}, None),
  ],
  ids=['full', 'window', 'two windows', 'self', 'pattern', 'scan'],
)
def test_causality_by_gradient(changes, reach):
  """Token t depends on every token of its segment from t - reach + 1 to t, and on nothing else."""
  model = make(**changes)
  row, positions, segments, _ = packed()
  embeds = parameters(model)['embed']['weight'][row[0]]
  found = influence(model, parameters(model), embeds, positions, segments)
  t, s = np.arange(18)[:, None], np.arange(18)[None, :]
  want = (segments.T == segments) & (s <= t) & (t - s < (reach or 18))
  real = segments[0] > 0
  np.testing.assert_array_equal((np.asarray(found) != 0)[real], want[real])


def test_padding_changes_nothing():
  model = make()
  short = tokens(2, 6)
  want, _ = hidden(model, parameters(model), short, *whole(short))
  for width in (7, 16):
    padded = np.full((2, width), 3, np.int32)
    padded[:, :6] = short
    got, _ = hidden(model, parameters(model), padded, *whole(padded, (6, 6)))
    close(got[:, :6], want)


@pytest.mark.parametrize('embed_scale', [False, True])
def test_embeddings_as_input(embed_scale):
  """Embeddings enter as they are: whoever passes them has scaled them."""
  model = make(embed_scale=embed_scale)
  params, tokens_BT = parameters(model), tokens(2, 6)
  want, _ = hidden(model, params, tokens_BT, *whole(tokens_BT))
  embeds = params['embed']['weight'][tokens_BT] * (12**0.5 if embed_scale else 1.0)
  close(hidden(model, params, embeds, *whole(tokens_BT))[0], want)


# ------------------------------------------------------------------------------------ cache, scan


CACHED = {
  'llama': {},
  'all switches': ALL_SWITCHES,
  'scan': {'scan_layers': True, 'sliding_window': 3},
}


@pytest.mark.parametrize('changes', CACHED.values(), ids=list(CACHED))
def test_decoding_with_a_cache_is_the_full_forward(changes):
  """Prefill rows of 2 and 4 tokens, then one token each, then a chunk of three, then one again."""
  model = make(**changes)
  params, rows, length = parameters(model), tokens(2, 9), np.array([2, 4])
  want, _ = hidden(model, params, rows, *whole(rows))
  start = rows[:, :5].copy()
  start[np.arange(5) >= length[:, None]] = 7  # what padding holds does not matter
  got, cache = hidden(model, params, start, *whole(start, length), model.init_cache(2, 12))
  for b in range(2):
    close(got[b, : length[b]], want[b, : length[b]])
  for width in (1, 3, 1):
    positions = (length[:, None] + np.arange(width)).astype(np.int32)
    new = np.take_along_axis(rows, positions, axis=1)
    got, cache = hidden(model, params, new, positions, np.ones_like(new), cache)
    close(got, want[np.arange(2)[:, None], positions])
    length = length + width


@pytest.mark.parametrize('scan_layers', [False, True])
def test_padding_is_nobodys_in_the_cache(scan_layers):
  model = make(scan_layers=scan_layers)
  rows, cache = tokens(2, 5), model.init_cache(2, 8)
  _, cache = hidden(model, parameters(model), rows, *whole(rows, (2, 4)), cache)
  assert cache.position_BS.tolist() == [[0, 1, *[-1] * 6], [0, 1, 2, 3, *[-1] * 4]]
  assert cache.slot == 5


def test_layers_share_their_rotations():
  """One cosine for all layers of a window, though a compiler might compute it in each of them."""
  if jax.__version_info__ < (0, 11, 2):
    pytest.skip('the compiler for CPUs takes barriers out before it joins operations')
  model = make(num_layers=4, sliding_window=3, sliding_window_pattern=2, rope_local_theta=100.0)
  cache = model.init_cache(2, 8)
  compiled = hidden.lower(
    model, parameters(model), tokens(2, 1), *whole(tokens(2, 1)), cache
  ).compile()
  assert compiled.as_text().count(' cosine(') == 2


@pytest.mark.parametrize('scan_layers', [False, True])
def test_a_step_writes_its_cache_in_place(scan_layers):
  """All layers read before: else a compiler copies what it may not overwrite yet."""
  model = make(num_layers=3, head_dim=64, scan_layers=scan_layers)
  params, cache = parameters(model), model.init_cache(2, 4096)
  step = jax.jit(model.hidden, donate_argnums=4)
  compiled = step.lower(params, tokens(2, 1), *whole(tokens(2, 1)), cache).compile()
  layer = cache.position_BS.size * 2 * 64 * 4  # its keys, or values: two heads of 64 float32
  assert compiled.memory_analysis().alias_size_in_bytes > 6 * layer
  taken = 2 if scan_layers else 0  # by the scan: the keys and values of the layer it is at
  assert compiled.memory_analysis().temp_size_in_bytes < (taken + 0.5) * layer


def test_scanned_and_checkpointed_layers_are_the_unrolled_ones():
  """One checkpoint format, one result, one gradient."""
  plain, rows = make(sliding_window=3, rope_local_theta=50.0), tokens(2, 6)
  params = parameters(plain)

  @functools.partial(jax.jit, static_argnums=0)
  def run(model, params):
    def loss(params):
      out, _ = model.hidden(params, rows, *whole(rows), None)
      return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

    return jax.grad(loss, has_aux=True)(params)

  for changes in ({'scan_layers': True}, {'remat': True}, {'scan_layers': True, 'remat': True}):
    model = dataclasses.replace(plain, **changes)
    jax.tree.map(close, run(model, params), run(plain, params))
  start, want = (jax.jit(m.init)(jax.random.key(0)) for m in (model, plain))
  jax.tree.map(np.testing.assert_array_equal, start, want)


# ------------------------------------------------------------------------------------ bad values


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'activation': 'relu'}, "activation='relu'.*gelu_tanh.*silu"),
    ({'num_kv_heads': 3}, 'num_heads=4.*num_kv_heads=3'),
    ({'param_dtype': 'float16'}, "param_dtype='float16'.*float32.*bfloat16"),
    ({'compute_dtype': 'f32'}, "compute_dtype='f32'.*float32.*bfloat16"),
    ({'head_dim': 5}, 'head_dim=5 is odd'),
    ({'sliding_window': 0}, 'sliding_window=0'),
    ({'rope_scaling': 'ntk'}, "rope_scaling='ntk'.*default, linear, llama3, yarn"),
    ({'rope_scaling': 'linear'}, "'linear' takes rope_factor=a number >= 1, not None"),
    ({'rope_factor': 8.0}, "'default' takes rope_factor=None, not 8.0"),
    ({'rope_scaling': 'linear', 'rope_factor': 0.5}, 'rope_factor=.*>= 1, not 0.5'),
    ({'rope_scaling': 'yarn', 'rope_factor': 4.0}, 'rope_original_max_position=.*not None'),
    ({'rope_low_freq_factor': 4.0}, 'rope_low_freq_factor=4.0.*rope_high_freq_factor=4.0'),
    ({'rope_beta_fast': 0.5}, 'rope_beta_slow=1.0.*rope_beta_fast=0.5'),
    ({'rope_local_theta': 1e4}, 'rope_local_theta=10000.0.*sliding_window=None'),
    (
      {'scan_layers': True, 'sliding_window': 3, 'sliding_window_pattern': 2},
      'scan_layers.*sliding_window=3.*every 2th',
    ),
  ],
)
def test_bad_values(changes, message):
  with pytest.raises(records.UserError, match=message):
    make(**changes)


# ------------------------------------------------------------------------------------ transformers


ORIGINAL = {'factor': 4.0, 'original_max_position_embeddings': 16}
STRETCHED = {'rope_factor': 4.0, 'rope_original_max_position': 16}
GEMMA_3 = {
  **{'activation': 'gelu_tanh', 'qk_norm': True, 'norm_plus_one': True, 'post_norms': True},
  **{'embed_scale': True, 'attention_scale': 0.25, 'norm_eps': 1e-6},
  **{'sliding_window': 6, 'sliding_window_pattern': 2, 'rope_local_theta': 5.0},
}
THEIRS = {  # transformers' rope_parameters (of Gemma 3: of its global layers) and our fields
  'default': ({'rope_type': 'default'}, {}),
  'linear': (
    {'rope_type': 'linear', 'factor': 8.0},
    {'rope_scaling': 'linear', 'rope_factor': 8.0},
  ),
  'llama3': (
    {'rope_type': 'llama3', **ORIGINAL, 'low_freq_factor': 0.5, 'high_freq_factor': 2.0},
    {
      **{'rope_scaling': 'llama3', **STRETCHED},
      **{'rope_low_freq_factor': 0.5, 'rope_high_freq_factor': 2.0},
    },
  ),
  'yarn': (
    {'rope_type': 'yarn', **ORIGINAL, 'beta_fast': 1.0, 'beta_slow': 0.25},
    {'rope_scaling': 'yarn', **STRETCHED, 'rope_beta_fast': 1.0, 'rope_beta_slow': 0.25},
  ),
  'attention factor': (
    {'rope_type': 'yarn', **ORIGINAL, 'attention_factor': 0.7},
    {'rope_scaling': 'yarn', **STRETCHED, 'rope_attention_factor': 0.7},
  ),
}


def from_transformers(state, num_layers: int):
  """A state dict of transformers as our parameters."""
  value = lambda name: jnp.asarray(state[f'{name}.weight'].numpy())
  post = 'layers.0.pre_feedforward_layernorm.weight' in state  # else its post_attention is our mlp
  layers = {}
  for i in range(num_layers):
    norms = {'attn_norm': 'input', 'mlp_norm': 'pre_feedforward' if post else 'post_attention'}
    if post:
      norms |= {'post_attn_norm': 'post_attention', 'post_mlp_norm': 'post_feedforward'}
    layer = layers[f'{i:02d}'] = {
      ours: {'scale': value(f'layers.{i}.{theirs}_layernorm')} for ours, theirs in norms.items()
    }
    layer['attn'] = {x: {'weight': value(f'layers.{i}.self_attn.{x}_proj')} for x in 'qkvo'}
    if post:
      for x in ('q_norm', 'k_norm'):
        layer['attn'][x] = {'scale': value(f'layers.{i}.self_attn.{x}')}
    layer['mlp'] = {
      x: {'weight': value(f'layers.{i}.mlp.{x}_proj')} for x in ('gate', 'up', 'down')
    }
  return {
    'embed': {'weight': value('embed_tokens')},
    'layers': layers,
    'final_norm': {'scale': value('norm')},
  }


@pytest.mark.hf
@pytest.mark.parametrize('family', ['llama', 'gemma3_text'])
@pytest.mark.parametrize('theirs, ours', THEIRS.values(), ids=list(THEIRS))
def test_transformers_agrees(family, theirs, ours):
  """Random weights; 24 tokens: more than the original 16 and than the window of 6."""
  import torch  # neither is a dependency
  import transformers

  model = make(**FOUR_PAIRS | (GEMMA_3 if family == 'gemma3_text' else {}) | ours)
  rope = theirs | {'rope_theta': model.rope_theta}
  fields = {'rope_parameters': rope, 'tie_word_embeddings': True}
  if family == 'gemma3_text':
    local = {'rope_type': 'default', 'rope_theta': model.rope_local_theta}
    fields['rope_parameters'] = {'full_attention': rope, 'sliding_attention': local}
    fields |= {'sliding_window': 6, 'sliding_window_pattern': 2, 'query_pre_attn_scalar': 16}
  network = transformers.AutoModel.from_config(
    transformers.AutoConfig.for_model(
      family,
      vocab_size=model.vocab_size,
      hidden_size=model.width,
      num_hidden_layers=model.num_layers,
      num_attention_heads=model.num_heads,
      num_key_value_heads=model.num_kv_heads,
      head_dim=model.head_dim,
      intermediate_size=model.mlp_width,
      rms_norm_eps=model.norm_eps,
      max_position_embeddings=64,
      **fields,
    ),
    attn_implementation='eager',
  )
  generator = torch.Generator().manual_seed(0)
  state = {
    name: 0.6 * torch.randn(x.shape, generator=generator)
    for name, x in network.state_dict().items()
  }
  network.load_state_dict(state)
  tokens_BT = tokens(2, 24)
  with torch.no_grad():
    want = network(torch.as_tensor(tokens_BT.astype(np.int64))).last_hidden_state.numpy()
  params = from_transformers(state, model.num_layers)
  got, _ = hidden(model, params, tokens_BT, *whole(tokens_BT))
  close(got, want, 1e-4)


def test_an_empty_cache_is_written_and_not_read():
  """Prefill: tokens look at one another, [T, T], and not at the slots of the cache, [T, S]."""
  model, rows = make(), tokens(2, 6)
  params, at = parameters(model), whole(rows, [6, 4])

  def prefill(params, cache, fresh):
    return model.hidden(params, rows, *at, cache, fresh=fresh)

  cache = model.init_cache(2, 32)
  for fresh, seen in ((True, '6,6'), (False, '6,32')):
    text = str(jax.make_jaxpr(functools.partial(prefill, fresh=fresh))(params, cache))
    assert f'{seen}]' in text
    assert fresh == ('6,32]' not in text)
  one, two = (prefill(params, cache, fresh)[1] for fresh in (True, False))
  for a, b in zip(jax.tree.leaves(one.own), jax.tree.leaves(two.own), strict=True):
    np.testing.assert_allclose(a[0], b[0], atol=1e-5)
    np.testing.assert_allclose(a[1, :, :4], b[1, :, :4], atol=1e-5)
