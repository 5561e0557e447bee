"""The Hugging Face format and the decoder: config fields, tensor names, a folder read.

1. FAMILIES says which switches of the decoder make which architecture; `family` finds it.
2. `config` and `names` are what `export` writes: config.json, and a tensor for every parameter.
3. `read` takes a folder back: hyperparameters under the names of the decoder's fields, parameters
   as NumPy arrays. What the decoder cannot represent is refused by name: no tensor is skipped.

Shapes never change: weights are [out, in] and rotary channels half-split on both sides. Left out on
purpose: rotary positions that `rope` leaves out, mixtures of them other than Gemma 3's, the text
part of multimodal files, and weights in other files than safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

from flax import traverse_util

from reasonrl import pretrained, records
from reasonrl.models import rope

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
INDEX = 'model.safetensors.index.json'  # only beside several files of weights
POSITIVE = 'a positive number'


@dataclasses.dataclass(frozen=True)
class Family:
  """An architecture as switches of the decoder."""

  architecture: str
  switches: dict[str, Any]  # field -> its value or POSITIVE; fields left out are free
  keys: dict[str, str]  # field -> key of config.json, for the switches that it names
  left_out: dict[str, Any]  # key -> what transformers takes where a published file lacks it


_LLAMA = {
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
  'rope_local_theta': None,
}
_GEMMA = {
  'activation': 'gelu_tanh',
  'qkv_bias': False,
  'norm_plus_one': True,
  'post_norms': True,
  'embed_scale': True,
  'sliding_window': POSITIVE,
}
_WINDOW = {'sliding_window': 'sliding_window'}
_GEMMA_KEYS = {**_WINDOW, 'attention_scale': 'query_pre_attn_scalar'}
_THETA = {'rope_theta': 10_000.0}

FAMILIES = {  # model_type ->
  'llama': Family('LlamaForCausalLM', _LLAMA, {}, _THETA),
  'mistral': Family(
    'MistralForCausalLM',
    {**_LLAMA, 'sliding_window': POSITIVE, 'sliding_window_pattern': 0},
    _WINDOW,
    _THETA,
  ),
  'qwen2': Family('Qwen2ForCausalLM', {**_LLAMA, 'qkv_bias': True}, {}, _THETA),
  'qwen3': Family('Qwen3ForCausalLM', {**_LLAMA, 'qk_norm': True}, {}, _THETA),
  'gemma2': Family(
    'Gemma2ForCausalLM',
    {**_GEMMA, 'qk_norm': False, 'sliding_window_pattern': 2, 'rope_local_theta': None},
    {
      **_GEMMA_KEYS,
      'attention_softcap': 'attn_logit_softcapping',
      'final_softcap': 'final_logit_softcapping',
    },
    _THETA,
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    {
      **_GEMMA,
      'qk_norm': True,
      'attention_softcap': None,
      'final_softcap': None,
      'sliding_window_pattern': POSITIVE,
      'rope_local_theta': POSITIVE,
    },
    {
      **_GEMMA_KEYS,
      'sliding_window_pattern': 'sliding_window_pattern',
      'rope_local_theta': 'rope_local_base_freq',
    },
    {  # nearly all of 4B is said by leaving it out
      'vocab_size': 262_208,
      'num_attention_heads': 8,
      'num_key_value_heads': 4,
      'head_dim': 256,
      'hidden_activation': 'gelu_pytorch_tanh',
      'rms_norm_eps': 1e-6,
      'max_position_embeddings': 131_072,
      'tie_word_embeddings': True,
      'query_pre_attn_scalar': 256,
      'sliding_window_pattern': 6,
      'rope_theta': 1_000_000.0,
      'rope_local_base_freq': 10_000.0,
    },
  ),
}

KEYS = {  # field -> key of config.json, in every family
  'vocab_size': 'vocab_size',
  'num_layers': 'num_hidden_layers',
  'width': 'hidden_size',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'mlp_width': 'intermediate_size',
  'rope_theta': 'rope_theta',
  'tied_embeddings': 'tie_word_embeddings',
  'norm_eps': 'rms_norm_eps',
  'max_position': 'max_position_embeddings',
}
# Left out by many files; the shapes of the tensors show them.
OPTIONAL = ('num_key_value_heads', 'head_dim', 'tie_word_embeddings')
ROPE = {  # field -> key of `rope_scaling`, for the fields that a scaling takes
  'rope_scaling': 'rope_type',
  'rope_factor': 'factor',
  'rope_original_max_position': 'original_max_position_embeddings',
  'rope_low_freq_factor': 'low_freq_factor',
  'rope_high_freq_factor': 'high_freq_factor',
  'rope_beta_fast': 'beta_fast',
  'rope_beta_slow': 'beta_slow',
  'rope_attention_factor': 'attention_factor',
}
YARN = {'beta_fast': 32.0, 'beta_slow': 1.0, 'attention_factor': None}  # where a file lacks them
FIXED = {'truncate': True, 'partial_rotary_factor': 1.0}  # other keys -> what the decoder computes
ACTIVATIONS = {'silu': 'silu', 'gelu_tanh': 'gelu_pytorch_tanh'}

# Path inside a layer -> name of the tensor inside model.layers.<i>.
LAYER = {
  'attn_norm/scale': 'input_layernorm.weight',
  'attn/q/weight': 'self_attn.q_proj.weight',
  'attn/k/weight': 'self_attn.k_proj.weight',
  'attn/v/weight': 'self_attn.v_proj.weight',
  'attn/o/weight': 'self_attn.o_proj.weight',
  'mlp/gate/weight': 'mlp.gate_proj.weight',
  'mlp/up/weight': 'mlp.up_proj.weight',
  'mlp/down/weight': 'mlp.down_proj.weight',
}
QKV_BIAS = {f'attn/{x}/bias': f'self_attn.{x}_proj.bias' for x in 'qkv'}
QK_NORM = {f'attn/{x}_norm/scale': f'self_attn.{x}_norm.weight' for x in 'qk'}
PRE_NORM = {'mlp_norm/scale': 'post_attention_layernorm.weight'}
POST_NORMS = {  # here 'post attention' means what it says
  'post_attn_norm/scale': 'post_attention_layernorm.weight',
  'mlp_norm/scale': 'pre_feedforward_layernorm.weight',
  'post_mlp_norm/scale': 'post_feedforward_layernorm.weight',
}


def names(fields: dict[str, Any]) -> dict[str, str]:
  """Path of every parameter -> the name of its tensor; `fields` are the decoder's."""
  layer = {**LAYER, **(POST_NORMS if fields['post_norms'] else PRE_NORM)}
  layer |= QKV_BIAS if fields['qkv_bias'] else {}
  layer |= QK_NORM if fields['qk_norm'] else {}
  found = {'embed/weight': 'model.embed_tokens.weight', 'final_norm/scale': 'model.norm.weight'}
  if not fields['tied_embeddings']:
    found['heads/lm/weight'] = 'lm_head.weight'
  for i in range(fields['num_layers']):
    found |= {f'layers/{i:02d}/{path}': f'model.layers.{i}.{name}' for path, name in layer.items()}
  return found


def family(model) -> str:
  """The model_type whose architecture computes what this decoder computes.

  Raises:
    UserError: there is none; names the nearest.
  """

  def differences(model_type):
    found = []
    for field, wanted in FAMILIES[model_type].switches.items():
      value = getattr(model, field)
      if not value if wanted is POSITIVE else value != wanted:
        found.append(f'{field}={value!r}, not {wanted!r}')
    return found

  nearest = min(FAMILIES, key=lambda model_type: len(differences(model_type)))
  if wrong := differences(nearest):
    raise records.UserError(
      f'no Hugging Face architecture is this model; it would be {nearest} but for '
      + '; '.join(wrong)
    )
  return nearest


def config(model) -> dict[str, Any]:
  """config.json of a Decoder, but for the dtype and the tokenizer's ids.

  The keys are those of transformers before version 5 (`rope_theta` and `rope_scaling`, not
  `rope_parameters`), which newer and older readers take. Versions 4.51 to 4.55 give YaRN the factor
  max_position / rope_original_max_position, whatever is written.

  Raises:
    UserError: no architecture fits, see `family`; a field has a value that transformers cannot say.
  """
  model_type = family(model)
  if model.width % model.num_heads:
    raise records.UserError(
      f'transformers refuses num_heads={model.num_heads}, which does not divide width={model.width}'
    )
  architecture, keys = FAMILIES[model_type].architecture, FAMILIES[model_type].keys
  found = {'architectures': [architecture], 'model_type': model_type}
  found |= {key: getattr(model, field) for field, key in {**KEYS, **keys}.items()}
  found['hidden_act'] = ACTIVATIONS[model.activation]
  scaling = {key: getattr(model, field) for field, key in _rope_keys(model.rope_scaling).items()}
  if model.rope_scaling != 'default':
    found['rope_scaling'] = {key: value for key, value in scaling.items() if value is not None}
  if model.rope_attention_factor != scaling.get('attention_factor'):
    raise records.UserError(
      f'transformers has no rope_attention_factor={model.rope_attention_factor} of '
      f'rope_scaling={model.rope_scaling!r}, only of yarn'
    )
  if 'attention_scale' in keys:  # the Gemmas
    found['query_pre_attn_scalar'] = _query_scalar(model)
    found['hidden_activation'] = found['hidden_act']
  return found


def _rope_keys(scaling: str) -> dict[str, str]:
  """The part of ROPE that this scaling takes."""
  fields = ('rope_scaling', *rope.SCALINGS[scaling][1])
  if scaling == 'yarn':
    fields += ('rope_attention_factor',)
  return {field: ROPE[field] for field in fields}


def _query_scalar(model) -> int:
  """Gemma's form of the attention scale: scale = scalar ** -0.5, an integer."""
  scale = model.attention_scale or model.head_dim**-0.5
  scalar = round(scale**-2)
  if not math.isclose(scalar**-0.5, scale, rel_tol=1e-6):
    raise records.UserError(
      f'attention_scale={scale} is not n ** -0.5 for an integer n, as Gemma has it'
    )
  return scalar


def read(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Hyperparameters and parameters of a folder of config.json and safetensors.

  Returns:
    (decoder field -> value, for all that config.json states; parameter tree of the decoder, in the
    dtype of the files).

  Raises:
    UserError: what `hyperparameters` refuses, missing tensors, or tensors that have no place.
  """
  hyper = hyperparameters(directory / CONFIG)
  safetensors = pretrained.package('safetensors')
  index = directory / INDEX
  files = set(_json(index)['weight_map'].values()) if index.exists() else {WEIGHTS}
  tensors = {}
  for file in sorted(files):
    if not (directory / file).is_file():
      raise records.UserError(f'no file {str(directory / file)!r}')
    with safetensors.safe_open(directory / file, framework='numpy') as opened:
      tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
  if hyper.setdefault('tied_embeddings', 'lm_head.weight' not in tensors):
    tensors.pop('lm_head.weight', None)  # some files repeat the embedding
  wanted = names(hyper)
  if missing := [name for name in wanted.values() if name not in tensors]:
    raise records.UserError(f'{directory} lacks the tensors {", ".join(missing)}')
  params = {path: tensors.pop(name) for path, name in wanted.items()}
  if tensors:
    raise records.UserError(f'{directory} has tensors without a place: {", ".join(tensors)}')
  return hyper, {'heads': {}, **traverse_util.unflatten_dict(params, sep='/')}


def hyperparameters(path: pathlib.Path) -> dict[str, Any]:
  """The decoder's fields from a config.json of transformers 4 or 5.

  Raises:
    UserError: another model_type, rotary positions or windows that the switches cannot say, missing
      keys.
  """
  config = _json(path)
  if config.get('model_type') not in FAMILIES:
    raise records.UserError(
      f'{path}: model_type={config.get("model_type")!r} is not one of {", ".join(FAMILIES)}'
    )
  found = FAMILIES[config['model_type']]
  config = found.left_out | config
  hyper = {k: v for k, v in found.switches.items() if v is not POSITIVE}
  for field, key in {**KEYS, **found.keys}.items():
    if key in config and (config[key] is not None or field in found.keys):
      hyper[field] = config[key]
    elif key not in OPTIONAL:
      raise records.UserError(f'{path} lacks {key!r}')
  hyper |= _rotary(path, config, 'rope_local_theta' in found.keys)
  if 'attention_scale' in found.keys:
    scalar = hyper['attention_scale']
    hyper['attention_scale'] = None if scalar == hyper.get('head_dim') else scalar**-0.5
  act = config.get('hidden_activation', config.get('hidden_act'))
  if act != ACTIVATIONS[hyper['activation']]:
    raise records.UserError(f'{path}: activation {act!r}, not {ACTIVATIONS[hyper["activation"]]!r}')
  window, n = hyper['sliding_window'], hyper.get('sliding_window_pattern')
  kinds = [
    'full_attention' if window is None or (n and (i + 1) % n == 0) else 'sliding_attention'
    for i in range(hyper['num_layers'])
  ]
  other = config.get('use_sliding_window') or config.get('use_bidirectional_attention')
  if other or config.get('layer_types', kinds) != kinds:
    raise records.UserError(f'{path}: these windows of attention are not supported')
  return hyper


def _rotary(path: pathlib.Path, config: dict[str, Any], by_kind: bool) -> dict[str, Any]:
  """The fields rope_*; `by_kind`: windowed layers have a base of their own, never scaled."""
  new, old = (config.get(key) or {} for key in ('rope_parameters', 'rope_scaling'))
  if new and old:
    raise records.UserError(f'{path}: rope_parameters and rope_scaling, of which one is enough')
  if not by_kind:
    return _rope(path, config, 'rope_theta', new or old, rope.SCALINGS)
  kinds = ('full_attention', 'sliding_attention')
  if wrong := new.keys() - kinds:
    raise records.UserError(
      f'{path}: rope_parameters has {", ".join(sorted(wrong))}, not {" and ".join(kinds)} alone'
    )
  full, windowed = (new.get(kind) or {} for kind in kinds)
  local = _rope(path, config, 'rope_local_base_freq', windowed, ('default',))
  found = _rope(path, config, 'rope_theta', full or old, rope.SCALINGS)
  return {**found, 'rope_local_theta': local['rope_theta']}


def _rope(path: pathlib.Path, config: dict[str, Any], base: str, given: dict, scalings):
  """The fields that one dict says; `base`: key of config.json for the rope_theta that it lacks."""
  given = {'partial_rotary_factor': config.get('partial_rotary_factor'), **given}
  given = {key: value for key, value in given.items() if value is not None}
  scaling = given.setdefault('rope_type', given.pop('type', 'default'))  # 'type': its old name
  if scaling not in scalings:
    raise records.UserError(
      f'{path}: rope_type={scaling!r} of {base} is not one of {", ".join(scalings)}'
    )
  taken = {'rope_theta': 'rope_theta', **_rope_keys(scaling)}
  for key, value in given.items():
    if key not in taken.values() and value != FIXED.get(key):
      raise records.UserError(f'{path}: {key}={value!r} of rope_type={scaling!r} is not supported')
  original = config.get('original_max_position_embeddings', config['max_position_embeddings'])
  top = {'rope_theta': config[base], 'original_max_position_embeddings': original}
  given = {**YARN, **top, **given}
  if lacks := [key for key in taken.values() if key not in given]:
    raise records.UserError(f'{path} lacks {", ".join(lacks)} of rope_type={scaling!r}')
  return {'rope_attention_factor': None} | {field: given[key] for field, key in taken.items()}


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise records.UserError(f'{path} cannot be read: {error}') from error
