"""Which switches are which architecture, names and keys by hand, and folders that are refused."""

import json

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from reasonrl import records, sharding
from reasonrl.models import huggingface, rope

GEMMA = {
  'activation': 'gelu_tanh',
  'norm_plus_one': True,
  'post_norms': True,
  'embed_scale': True,
  'sliding_window': 3,
}
FAMILIES = {  # what the published models of each switch on
  'llama': {},
  'mistral': {'sliding_window': 3},
  'qwen2': {'qkv_bias': True},
  'qwen3': {'qk_norm': True},
  'gemma2': {
    **GEMMA,
    'sliding_window_pattern': 2,
    'attention_softcap': 50.0,
    'final_softcap': 30.0,
    'attention_scale': 9**-0.5,
  },
  'gemma3_text': {
    **GEMMA,
    'sliding_window_pattern': 6,
    'qk_norm': True,
    'rope_theta': 1e6,
    'rope_local_theta': 1e4,
  },
}
STRETCHED = {'rope_factor': 4.0, 'rope_original_max_position': 64}
SCALINGS = {  # name -> the decoder's fields, the dict of transformers
  'linear': (
    {'rope_scaling': 'linear', 'rope_factor': 8.0},
    {'rope_type': 'linear', 'factor': 8.0},
  ),
  'llama3': (
    {
      **{'rope_scaling': 'llama3', **STRETCHED},
      **{'rope_low_freq_factor': 0.5, 'rope_high_freq_factor': 2.0},
    },
    {
      **{'rope_type': 'llama3', 'factor': 4.0, 'original_max_position_embeddings': 64},
      **{'low_freq_factor': 0.5, 'high_freq_factor': 2.0},
    },
  ),
  'yarn': (
    {'rope_scaling': 'yarn', **STRETCHED, 'rope_beta_fast': 16.0, 'rope_beta_slow': 2.0},
    {
      **{'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64},
      **{'beta_fast': 16.0, 'beta_slow': 2.0},
    },
  ),
  'attention factor': (
    {'rope_scaling': 'yarn', **STRETCHED, 'rope_attention_factor': 0.7},
    {
      **{'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64},
      **{'beta_fast': 32.0, 'beta_slow': 1.0, 'attention_factor': 0.7},
    },
  ),
}


@pytest.mark.parametrize('name', FAMILIES)
def test_family(name):
  assert huggingface.family(tiny.model(**FAMILIES[name])) == name


def test_every_family_and_scaling_is_tested():
  assert FAMILIES.keys() == huggingface.FAMILIES.keys()
  assert {'default', *SCALINGS} == {*rope.SCALINGS, 'attention factor'}


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'qkv_bias': True, 'qk_norm': True}, 'qwen2 but for qk_norm=True, not False'),
    ({'activation': 'gelu_tanh'}, "llama but for activation='gelu_tanh', not 'silu'"),
    (
      {'sliding_window': 3, 'sliding_window_pattern': 2},
      'llama but for sliding_window=3, not None',
    ),
    ({'attention_scale': 0.1}, 'llama but for attention_scale=0.1, not None'),
    (
      {**GEMMA, 'sliding_window': None, 'sliding_window_pattern': 2},
      "window=None, not 'a positive n",
    ),
    ({**GEMMA, 'qk_norm': True, 'rope_local_theta': 5.0}, 'gemma3_text but for sliding_window_pat'),
    ({**FAMILIES['gemma3_text'], 'rope_local_theta': None}, 'gemma3_text .* rope_local_theta=None'),
    ({**FAMILIES['gemma2'], 'rope_local_theta': 5.0}, 'gemma2 but for rope_local_theta=5.0, not N'),
    ({**FAMILIES['mistral'], 'rope_local_theta': 5.0}, 'mistral but for rope_local_theta=5.0'),
    (
      {'rope_scaling': 'linear', 'rope_factor': 8.0, 'rope_attention_factor': 1.0},
      "no rope_attention_factor=1.0 of rope_scaling='linear', only of yarn",
    ),
    ({**FAMILIES['gemma2'], 'attention_scale': 0.3}, r'0.3 is not n \*\* -0.5 for an integer n'),
    ({'num_heads': 3}, 'num_heads=3, which does not divide width=8'),
  ],
)
def test_a_model_without_an_architecture_is_refused(changes, said):
  with pytest.raises(records.UserError, match=said):
    huggingface.config(tiny.model(**{'num_kv_heads': 1, **changes}))


COMMON = {
  'vocab_size': 11,
  'num_hidden_layers': 1,
  'hidden_size': 8,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'head_dim': 4,
  'intermediate_size': 8,
  'rope_theta': 10000.0,
  'tie_word_embeddings': True,
  'rms_norm_eps': 1e-5,
  'max_position_embeddings': 256,
  'hidden_act': 'silu',
}


def test_config_by_hand():
  llama = {'model_type': 'llama', 'architectures': ['LlamaForCausalLM']}
  assert huggingface.config(tiny.model()) == COMMON | llama
  found = huggingface.config(tiny.model(**FAMILIES['mistral']))
  assert (found['architectures'], found['sliding_window']) == (['MistralForCausalLM'], 3)
  gelu = {'hidden_act': 'gelu_pytorch_tanh', 'hidden_activation': 'gelu_pytorch_tanh'}
  assert huggingface.config(tiny.model(**FAMILIES['gemma2'])) == COMMON | gelu | {
    'model_type': 'gemma2',
    'architectures': ['Gemma2ForCausalLM'],
    'sliding_window': 3,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'query_pre_attn_scalar': 9,
  }
  assert huggingface.config(tiny.model(**FAMILIES['gemma3_text'])) == COMMON | gelu | {
    'model_type': 'gemma3_text',
    'architectures': ['Gemma3ForCausalLM'],
    'sliding_window': 3,
    'sliding_window_pattern': 6,
    'query_pre_attn_scalar': 4,  # None = head_dim
    'rope_theta': 1e6,
    'rope_local_base_freq': 1e4,
  }


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('fields, theirs', SCALINGS.values(), ids=list(SCALINGS))
def test_scaling_by_hand(name, fields, theirs):
  plain = huggingface.config(tiny.model(**FAMILIES[name]))
  found = huggingface.config(tiny.model(**FAMILIES[name], **fields))
  assert found == plain | {'rope_scaling': theirs}


NORM = {'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
GEMMA_NORM = {
  'attn_norm': 'input_layernorm',
  'post_attn_norm': 'post_attention_layernorm',
  'mlp_norm': 'pre_feedforward_layernorm',
  'post_mlp_norm': 'post_feedforward_layernorm',
}


@pytest.mark.parametrize('name', FAMILIES)
def test_names_by_hand(name):
  found = huggingface.names(vars(tiny.model(**FAMILIES[name], num_layers=12)))
  assert found['embed/weight'] == 'model.embed_tokens.weight'
  assert found['final_norm/scale'] == 'model.norm.weight'
  assert found['layers/11/attn/q/weight'] == 'model.layers.11.self_attn.q_proj.weight'
  assert found['layers/01/attn/o/weight'] == 'model.layers.1.self_attn.o_proj.weight'
  assert found['layers/01/mlp/down/weight'] == 'model.layers.1.mlp.down_proj.weight'
  for ours, theirs in (GEMMA_NORM if 'gemma' in name else NORM).items():
    assert found[f'layers/03/{ours}/scale'] == f'model.layers.3.{theirs}.weight'
  assert ('layers/00/attn/v/bias' in found) == (name == 'qwen2')
  assert ('layers/00/attn/k_norm/scale' in found) == (name in ('qwen3', 'gemma3_text'))
  assert 'heads/lm/weight' not in found
  found = huggingface.names(vars(tiny.model(tied_embeddings=False)))
  assert found['heads/lm/weight'] == 'lm_head.weight'


@pytest.mark.parametrize('name', FAMILIES)
def test_every_parameter_has_a_name_of_its_own(name):
  model = tiny.model(**FAMILIES[name], num_layers=2, tied_embeddings=False)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  paths = {sharding.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
  found = huggingface.names(vars(model))
  assert found.keys() == paths and len(set(found.values())) == len(paths)


def config_json(folder, **changes):
  """A config.json of the tiny Llama; None takes a key out."""
  fields = COMMON | {'model_type': 'llama'} | changes
  fields = {key: value for key, value in fields.items() if value is not None}
  (folder / 'config.json').write_text(json.dumps(fields))
  return folder / 'config.json'


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('scaling', ['default', *SCALINGS])
def test_what_config_says_is_read_back(tmp_path, name, scaling):
  fields = FAMILIES[name] | SCALINGS.get(scaling, ({},))[0]
  model = tiny.model(**fields)
  found = huggingface.hyperparameters(config_json(tmp_path, **huggingface.config(model)))
  assert found == {field: getattr(model, field) for field in found}
  always = {'rope_scaling', 'rope_attention_factor', 'rope_local_theta'}
  assert found.keys() >= huggingface.KEYS.keys() | fields.keys() | always


@pytest.mark.parametrize('fields, theirs', SCALINGS.values(), ids=list(SCALINGS))
def test_rope_parameters(tmp_path, fields, theirs):
  """What transformers 5 writes: bases inside of the dict, and of Gemma 3 a dict for each kind."""
  want = {'rope_theta': 500.0, 'rope_attention_factor': None, **fields}
  read = lambda **changes: huggingface.hyperparameters(config_json(tmp_path, **changes)).items()
  rotary = {'rope_theta': 500.0, **theirs}
  assert read(rope_parameters=rotary) >= (want | {'rope_local_theta': None}).items()
  old = {'type': rotary.pop('rope_type'), **rotary}
  assert read(rope_scaling=old) >= want.items()
  gemma = huggingface.config(tiny.model(**FAMILIES['gemma3_text']))
  local = {'rope_type': 'default', 'rope_theta': 20.0}
  kinds = {'sliding_attention': local, 'full_attention': {'rope_theta': 500.0, **theirs}}
  assert read(**gemma, rope_parameters=kinds) >= (want | {'rope_local_theta': 20.0}).items()
  # Without bases inside: those of the older keys.
  kinds = {'sliding_attention': None, 'full_attention': theirs}
  want |= {'rope_theta': 1e6, 'rope_local_theta': 1e4}
  assert read(**gemma, rope_parameters=kinds) >= want.items()


def test_what_yarn_leaves_out(tmp_path):
  bare = {'type': 'yarn', 'factor': 4.0, 'beta_fast': None, 'truncate': True}
  want = {'rope_factor': 4.0, 'rope_beta_fast': 32.0, 'rope_beta_slow': 1.0}
  want |= {'rope_attention_factor': None, 'rope_original_max_position': 256}
  found = huggingface.hyperparameters(config_json(tmp_path, rope_scaling=bare))
  assert found.items() >= want.items()
  path = config_json(tmp_path, rope_scaling=bare, original_max_position_embeddings=64)
  assert huggingface.hyperparameters(path)['rope_original_max_position'] == 64


def test_published_forms(tmp_path):
  # transformers 5: rope_parameters, layer_types. Its Qwen keeps a window that it does not use.
  qwen = {
    'model_type': 'qwen2',
    'rope_theta': None,
    'rope_parameters': {'rope_theta': 1e6, 'rope_type': 'default'},
    'layer_types': ['full_attention'],
    'use_sliding_window': False,
    'sliding_window': 4096,
  }
  found = huggingface.hyperparameters(config_json(tmp_path, **qwen))
  assert (found['rope_theta'], found['sliding_window'], found['qkv_bias']) == (1e6, None, True)
  # Early Llama files leave out what the shapes show, and the rotary base.
  bare = dict.fromkeys(('head_dim', 'num_key_value_heads', 'tie_word_embeddings', 'rope_theta'))
  found = huggingface.hyperparameters(config_json(tmp_path, **bare))
  assert found['rope_theta'] == 10000.0 and not found.keys() & (bare.keys() - {'rope_theta'})
  # Mistral 0.2 gave up the window.
  path = config_json(tmp_path, model_type='mistral')
  path.write_text(path.read_text().replace('{', '{"sliding_window": null, '))
  assert huggingface.hyperparameters(path)['sliding_window'] is None


SMALL = {  # Gemma 3 to 1B
  **{'num_attention_heads': 4, 'num_key_value_heads': 1, 'head_dim': 256, 'vocab_size': 262144},
  **{'hidden_activation': 'gelu_pytorch_tanh', 'rms_norm_eps': 1e-6, 'sliding_window': 512},
  **{'query_pre_attn_scalar': 256, 'max_position_embeddings': 32768, 'rope_scaling': None},
  **{'rope_theta': 1000000, 'rope_local_base_freq': 10000},
}
LARGE = {'sliding_window': 1024, 'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}}
GEMMA_3 = {  # what the text part of each size says
  '270m': {
    **SMALL,
    **{'hidden_size': 640, 'intermediate_size': 2048, 'num_hidden_layers': 18},
    'layer_types': (['sliding_attention'] * 5 + ['full_attention']) * 3,
  },
  '1b': {
    **SMALL,
    **{'hidden_size': 1152, 'intermediate_size': 6912, 'num_hidden_layers': 26},
    'sliding_window_pattern': 6,
  },
  '4b': {**LARGE, 'hidden_size': 2560, 'intermediate_size': 10240, 'num_hidden_layers': 34},
  '12b': {
    **LARGE,
    **{'hidden_size': 3840, 'intermediate_size': 15360, 'num_hidden_layers': 48},
    **{'num_attention_heads': 16, 'num_key_value_heads': 8},
  },
  '27b': {
    **LARGE,
    **{'hidden_size': 5376, 'intermediate_size': 21504, 'num_hidden_layers': 62},
    **{'num_attention_heads': 32, 'num_key_value_heads': 16, 'head_dim': 128},
    'query_pre_attn_scalar': 168,
  },
}
MEANT = {  # size -> width, layers, heads, of keys, their channels, attention_scale
  '270m': (640, 18, 4, 1, 256, None),
  '1b': (1152, 26, 4, 1, 256, None),
  '4b': (2560, 34, 8, 4, 256, None),
  '12b': (3840, 48, 16, 8, 256, None),
  '27b': (5376, 62, 32, 16, 128, 168**-0.5),
}


@pytest.mark.parametrize('size', GEMMA_3)
def test_published_gemma_3(tmp_path, size):
  names = ('width', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'attention_scale')
  want = FAMILIES['gemma3_text'] | dict(zip(names, MEANT[size], strict=True))
  want |= {'mlp_width': GEMMA_3[size]['intermediate_size'], 'norm_eps': 1e-6, 'qkv_bias': False}
  want |= {'tied_embeddings': True, 'attention_softcap': None, 'final_softcap': None}
  want |= {'rope_theta': 1e6, 'rope_local_theta': 1e4, 'rope_attention_factor': None}
  if size in ('270m', '1b'):
    want |= {'vocab_size': 262144, 'max_position': 32768, 'sliding_window': 512}
    want |= {'rope_scaling': 'default'}
  else:
    want |= {'vocab_size': 262208, 'max_position': 131072, 'sliding_window': 1024}
    want |= {'rope_scaling': 'linear', 'rope_factor': 8.0}
  path = tmp_path / 'config.json'
  path.write_text(json.dumps({'model_type': 'gemma3_text', **GEMMA_3[size]}))
  assert huggingface.hyperparameters(path) == want


LINEAR, YARN = SCALINGS['linear'][1], SCALINGS['yarn'][1]
GEMMA_3_CONFIG = huggingface.config(tiny.model(**FAMILIES['gemma3_text']))


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'model_type': 'qwen3_moe'}, "'qwen3_moe' is not one of llama, mistral, qwen2, .*gemma3_text"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'lacks low_freq_.*, high_.*llama3'),
    ({'rope_scaling': {'type': 'linear', 'factor': None}}, "lacks factor of rope_type='linear'"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "'dynamic' of .* default, .*, yarn"),
    ({'rope_parameters': {'rope_type': 'longrope', 'long_factor': [1.0]}}, "rope_type='longrope'"),
    ({'rope_scaling': YARN | {'mscale': 0.7}}, "mscale=0.7 of rope_type='yarn'"),
    ({'rope_scaling': YARN | {'mscale_all_dim': 0.7}}, 'mscale_all_dim=0.7'),
    ({'rope_parameters': YARN | {'truncate': False}}, 'truncate=False'),
    ({'rope_scaling': {'rope_type': 'default', 'factor': 2.0}}, "factor=2.0 of .*'default'"),
    ({'rope_scaling': LINEAR | {'attention_factor': 0.7}}, "attention_factor=0.7 of .*'linear'"),
    ({'rope_scaling': LINEAR | {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
    ({'partial_rotary_factor': 0.5}, "partial_rotary_factor=0.5 of .*'default'"),
    ({'rope_scaling': LINEAR, 'rope_parameters': LINEAR}, 'rope_parameters and rope_scaling'),
    ({'rope_parameters': {'sliding_attention': {}, 'full_attention': {}}}, 'sliding_attention={}'),
    (
      GEMMA_3_CONFIG | {'rope_parameters': {'sliding_attention': LINEAR}},
      "rope_type='linear' of rope_local_base_freq is not one of default$",
    ),
    (GEMMA_3_CONFIG | {'rope_parameters': LINEAR}, 'has factor, rope_type, not full_attention and'),
    (
      GEMMA_3_CONFIG | {'rope_parameters': {'full_attention': LINEAR, 'chunked_attention': LINEAR}},
      'rope_parameters has chunked_attention',
    ),
    (GEMMA_3_CONFIG | {'use_bidirectional_attention': True}, 'windows of attention'),
    ({'hidden_act': 'gelu'}, "activation 'gelu', not 'silu'"),
    ({'rms_norm_eps': None}, "lacks 'rms_norm_eps'"),
    ({'model_type': 'mistral'}, "lacks 'sliding_window'"),
    ({'model_type': 'gemma2', 'sliding_window': 3}, "lacks 'query_pre_attn_scalar'"),
    ({'layer_types': ['sliding_attention']}, 'windows of attention'),
    ({'model_type': 'qwen3', 'use_sliding_window': True}, 'windows of attention'),
  ],
)
def test_what_the_decoder_cannot_represent_is_refused(tmp_path, changes, said):
  with pytest.raises(records.UserError, match=said):
    huggingface.read(config_json(tmp_path, **changes).parent)


def test_bad_folders(tmp_path):
  with pytest.raises(records.UserError, match='config.json cannot be read'):
    huggingface.read(tmp_path)
  config_json(tmp_path)
  with pytest.raises(records.UserError, match="no file .*model.safetensors'"):
    huggingface.read(tmp_path)
  tensors = {
    name: np.zeros(2, np.float32) for name in huggingface.names(vars(tiny.model())).values()
  }
  save_file(tensors | {'model.layers.0.self_attn.o_proj.bias': np.zeros(8)}, tmp_path / 'x')
  save_file(tensors, tmp_path / 'model.safetensors')
  huggingface.read(tmp_path)
  (tmp_path / 'x').rename(tmp_path / 'model.safetensors')
  with pytest.raises(records.UserError, match='without a place: model.layers.0.self_attn.o_proj'):
    huggingface.read(tmp_path)
  del tensors['model.norm.weight']
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(records.UserError, match='lacks the tensors model.norm.weight'):
    huggingface.read(tmp_path)


def test_a_repeated_embedding_is_dropped_where_the_config_says_tied(tmp_path):
  tensors = {name: np.zeros(2) for name in huggingface.names(vars(tiny.model())).values()}
  tensors['lm_head.weight'] = np.zeros(2)
  save_file(tensors, tmp_path / 'model.safetensors')
  config_json(tmp_path, tie_word_embeddings=True)
  assert huggingface.read(tmp_path)[1]['heads'] == {}
  config_json(tmp_path, tie_word_embeddings=None)  # then the tensors decide
  hyper, params = huggingface.read(tmp_path)
  assert not hyper['tied_embeddings'] and params['heads'].keys() == {'lm'}
