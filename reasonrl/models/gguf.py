"""Pretrained weights from a GGUF file, as a NumPy parameter tree.

1. The header gives the hyperparameters, under the names of the decoder's fields.
2. Each tensor is dequantised to float32 and put where the decoder expects it.
3. What the decoder cannot represent is refused by name: no tensor is skipped.

Only the `llama` architecture (Llama, SmolLM2 and their kin). Left out on purpose: writing GGUF, and
placing arrays on devices (sharding.py does that to any tree).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from reasonrl import pretrained, records

ARCHITECTURES = ('llama',)

# GGUF name inside a block -> path inside a layer.
LAYER = {
  'attn_norm': ('attn_norm', 'scale'),
  'attn_q': ('attn', 'q', 'weight'),
  'attn_k': ('attn', 'k', 'weight'),
  'attn_v': ('attn', 'v', 'weight'),
  'attn_output': ('attn', 'o', 'weight'),
  'ffn_norm': ('mlp_norm', 'scale'),
  'ffn_gate': ('mlp', 'gate', 'weight'),
  'ffn_up': ('mlp', 'up', 'weight'),
  'ffn_down': ('mlp', 'down', 'weight'),
}


def read(path_or_name: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """Hyperparameters and float32 parameters, all weights [out, in].

  Args:
    path_or_name: as in `pretrained.find_gguf`.

  Returns:
    ({vocab_size, num_layers, width, num_heads, num_kv_heads, head_dim, mlp_width, rope_theta,
    rope_scaling, norm_eps, tied_embeddings, max_position}, parameter tree of the decoder).

  Raises:
    UserError: another architecture, a scaled or partial rotary embedding, missing tensors, or
      tensors that have no place in the tree.
  """
  path = pretrained.find_gguf(str(path_or_name))
  reader = pretrained.open_gguf(path)
  hyper = hyperparameters(reader)
  import gguf  # open_gguf has made sure that it is there

  tensors = {t.name: t for t in reader.tensors}

  def take(name):
    if name not in tensors:
      raise records.UserError(f'{path} has no tensor {name!r}')
    tensor = tensors.pop(name)
    weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.array(weight, np.float32)  # a copy: the source may be a view of the mapped file

  params = {'embed': {'weight': take('token_embd.weight')}, 'layers': {}}
  for n in range(hyper['num_layers']):
    layer = params['layers'][f'{n:02d}'] = {}
    for name, (*parents, leaf) in LAYER.items():
      weight = take(f'blk.{n}.{name}.weight')
      if name == 'attn_q':
        weight = half_split(weight, hyper['num_heads'])
      elif name == 'attn_k':
        weight = half_split(weight, hyper['num_kv_heads'])
      node = layer
      for parent in parents:
        node = node.setdefault(parent, {})
      node[leaf] = weight
  params['final_norm'] = {'scale': take('output_norm.weight')}
  tied = hyper['tied_embeddings']
  params['heads'] = {} if tied else {'lm': {'weight': take('output.weight')}}
  if tensors:
    raise records.UserError(f'{path} has tensors that the decoder cannot use: {", ".join(tensors)}')
  return hyper, params


def hyperparameters(reader) -> dict[str, Any]:
  """The decoder's fields from an open GGUF file; see `read`."""
  fields = {
    key: field.contents()
    for key, field in reader.fields.items()
    if not key.startswith('tokenizer.')
  }
  arch = fields['general.architecture']
  if arch not in ARCHITECTURES:
    raise records.UserError(
      f'GGUF architecture {arch!r}; choose a file of {", ".join(ARCHITECTURES)}'
    )
  shapes = {t.name: t.shape.tolist() for t in reader.tensors}  # fastest axis first
  heads = fields['llama.attention.head_count']
  width = fields['llama.embedding_length']
  head_dim = fields.get('llama.attention.key_length', width // heads)
  scaled = [key for key in fields if key.startswith('llama.rope.scal')]
  if scaled and fields.get('llama.rope.scaling.type') != 'none':
    raise records.UserError(f'scaled rotary embeddings are not read ({", ".join(scaled)})')
  rotary = fields.get('llama.rope.dimension_count', head_dim)
  if rotary != head_dim:
    raise records.UserError(f'rotary embedding on {rotary} of {head_dim} channels is not supported')
  return {
    'vocab_size': shapes['token_embd.weight'][1],
    'num_layers': fields['llama.block_count'],
    'width': width,
    'num_heads': heads,
    'num_kv_heads': fields.get('llama.attention.head_count_kv', heads),
    'head_dim': head_dim,
    'mlp_width': fields['llama.feed_forward_length'],
    'rope_theta': _decimal(fields.get('llama.rope.freq_base', 10_000.0)),  # the format's default
    'rope_scaling': 'default',  # others were refused above
    'norm_eps': _decimal(fields['llama.attention.layer_norm_rms_epsilon']),
    'tied_embeddings': 'output.weight' not in shapes,
    'max_position': fields['llama.context_length'],
  }


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a q or k projection [heads*C, D] in the order of a half-split rotary embedding.

  llama.cpp rotates channels (2i, 2i+1) together and its converter permuted these rows to suit; the
  decoder rotates (i, i + C/2), as the original weights do. Llama-architecture files only: those of
  Qwen and Gemma were never permuted.
  """
  out, width = weight.shape
  pairs = weight.reshape(heads, out // heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(out, width)


def _decimal(stored: float) -> float:
  """The number that was meant: a float32 1e-5 reads back as 9.999999747378752e-06."""
  return float(str(np.float32(stored)))
