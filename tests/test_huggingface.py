"""Which switches are which architecture, names and keys by hand, and folders that are refused."""

import json

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from reasonrl import records, sharding
from reasonrl.models import huggingface

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
  'gemma3_text': {**GEMMA, 'sliding_window_pattern': 6, 'qk_norm': True},
}


@pytest.mark.parametrize('name', FAMILIES)
def test_family(name):
  assert huggingface.family(tiny.model(**FAMILIES[name])) == name


def test_every_family_is_tested():
  assert FAMILIES.keys() == huggingface.FAMILIES.keys()


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
    ({**GEMMA, 'qk_norm': True}, 'gemma3_text but for sliding_window_pattern=0, not'),
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
    'rope_local_base_freq': 10000.0,
  }


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
def test_what_config_says_is_read_back(tmp_path, name):
  model = tiny.model(**FAMILIES[name])
  found = huggingface.hyperparameters(config_json(tmp_path, **huggingface.config(model)))
  assert found == {field: getattr(model, field) for field in found}
  assert found.keys() >= huggingface.KEYS.keys() | FAMILIES[name].keys()


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


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'model_type': 'qwen3_moe'}, "'qwen3_moe' is not one of llama, mistral, qwen2, .*gemma3_text"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'rotary embeddings are not supp'),
    ({'rope_parameters': {'sliding_attention': {}, 'full_attention': {}}}, 'several rotary'),
    ({'rope_local_base_freq': 1e4, 'rope_theta': 1e6}, 'several rotary'),
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
