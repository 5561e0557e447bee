"""llama.cpp by its C interface: python llama_cpp_batch.py <folder> <dtype>.

Prompts are decoded once and copied to their samples (`llama_memory_seq_cp`); then one batch of all
rows per token, and llama.cpp's own samplers. Keys and values are float16, its default.
"""

import ctypes
import json
import os
import pathlib
import sys

import gguf
import llama_cpp
import numpy as np
import protocol
from safetensors import safe_open

KINDS = {'float32': gguf.GGMLQuantizationType.F32, 'bfloat16': gguf.GGMLQuantizationType.BF16}
NAMES = {  # of a layer
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
WHOLE = {
  'model.embed_tokens.weight': 'token_embd.weight',
  'model.norm.weight': 'output_norm.weight',
}
ROWS, CONTEXT = 64, 512


def convert(folder: pathlib.Path, dtype: str) -> pathlib.Path:
  """A GGUF file without a vocabulary, beside the folder's own files."""
  to = folder / f'{dtype}.gguf'
  have = json.loads((folder / 'config.json').read_text())
  heads, kv_heads = have['num_attention_heads'], have['num_key_value_heads']
  writer = gguf.GGUFWriter(to, 'llama')
  writer.add_vocab_size(have['vocab_size'])
  writer.add_context_length(have['max_position_embeddings'])
  writer.add_embedding_length(have['hidden_size'])
  writer.add_block_count(have['num_hidden_layers'])
  writer.add_feed_forward_length(have['intermediate_size'])
  writer.add_head_count(heads)
  writer.add_head_count_kv(kv_heads)
  writer.add_layer_norm_rms_eps(have['rms_norm_eps'])
  writer.add_rope_dimension_count(have['hidden_size'] // heads)
  writer.add_rope_freq_base(have.get('rope_theta') or have['rope_parameters']['rope_theta'])
  writer.add_tokenizer_model('no_vocab')
  with safe_open(folder / 'model.safetensors', 'numpy') as tensors:
    for name in tensors.keys():  # noqa: SIM118, not a dict
      value = tensors.get_tensor(name).astype(np.float32)
      if name in WHOLE:
        new = WHOLE[name]
      else:
        _, _, layer, rest = name.split('.', 3)
        part = NAMES[rest.removesuffix('.weight')]
        new = f'blk.{layer}.{part}.weight'
        if part in ('attn_q', 'attn_k'):  # rotary pairs are neighbours here
          value = _neighbours(value, heads if part == 'attn_q' else kv_heads)
      kind = KINDS['float32'] if value.ndim == 1 else KINDS[dtype]
      writer.add_tensor(new, gguf.quants.quantize(value, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return to


def _neighbours(value, heads: int):
  """Rows of each head in the order 0, C/2, 1, C/2 + 1, ..."""
  return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def main(folder: str, dtype: str) -> None:
  llama_cpp.llama_log_set(SILENT, None)
  llama_cpp.llama_backend_init()
  path = convert(pathlib.Path(folder), dtype)
  model = llama_cpp.llama_model_load_from_file(
    str(path).encode(), llama_cpp.llama_model_default_params()
  )
  params = llama_cpp.llama_context_default_params()
  params.n_ctx, params.n_batch, params.n_ubatch = ROWS * CONTEXT, 1024, 512
  # Unified, every row would look through the keys of all rows; so a prompt is copied.
  params.n_seq_max, params.kv_unified = ROWS, False
  params.n_threads = params.n_threads_batch = os.cpu_count()
  context = llama_cpp.llama_init_from_model(model, params)
  memory = llama_cpp.llama_get_memory(context)
  batch = llama_cpp.llama_batch_init(1024, 0, 1)

  def feed(tokens):
    """tokens: (id, position, sequence, whether its logits are wanted)."""
    batch.n_tokens = len(tokens)
    for i, (token, position, sequence, wanted) in enumerate(tokens):
      batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
      batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    if llama_cpp.llama_decode(context, batch):
      raise RuntimeError(f'llama_decode of {len(tokens)} tokens failed')

  def generate(prompts, samples, new, temperature, seed):
    llama_cpp.llama_memory_clear(memory, True)
    rows = len(prompts) * samples
    chains = [_chain(temperature, seed * rows + row) for row in range(rows)]
    sample = lambda row, at: llama_cpp.llama_sampler_sample(chains[row], context, at)
    out = [[] for _ in range(rows)]
    for p, prompt in enumerate(prompts):
      last = len(prompt) - 1
      feed([(token, i, p * samples, i == last) for i, token in enumerate(prompt)])
      for row in range(p * samples, (p + 1) * samples):
        if row > p * samples:
          llama_cpp.llama_memory_seq_cp(memory, p * samples, row, 0, -1)
        out[row].append(sample(row, last))
    for step in range(1, new):
      at = len(prompts[0]) + step - 1
      feed([(out[row][-1], at, row, True) for row in range(rows)])
      for row in range(rows):
        out[row].append(sample(row, row))
    for chain in chains:
      llama_cpp.llama_sampler_free(chain)
    return out

  protocol.serve(generate)


def _chain(temperature, seed: int):
  chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
  one = llama_cpp.llama_sampler_init_dist(seed) if temperature else None
  llama_cpp.llama_sampler_chain_add(chain, one or llama_cpp.llama_sampler_init_greedy())
  return chain


SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)

if __name__ == '__main__':
  main(*sys.argv[1:])
