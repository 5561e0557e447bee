"""SmolLM2-135M as a Hugging Face folder, and texts for it: what benchmarks give to all engines."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp

from reasonrl import export, pretrained
from reasonrl.configs import common
from reasonrl.models import decoder, gguf, huggingface
from reasonrl.tokenizers.byte_level_bpe import ByteLevelBPE

ROOT = pathlib.Path(__file__).parents[1]


def write(folder: pathlib.Path) -> decoder.Decoder:
  """config.json, float32 safetensors and the tokenizer's files. Returns the decoder."""
  fields, params = gguf.read(pretrained.SMOLLM2)
  config = common.model('smollm2_135m').to_dict() | fields
  model = decoder.Decoder(**{k: v for k, v in config.items() if k not in ('kind', 'weights')})
  names = huggingface.names(config)
  tensors = export.by_name(names, jax.tree.map(jnp.asarray, params))
  shapes = export.by_name(names, jax.eval_shape(model.init, jax.random.key(0)))
  export.write_weights(tensors, shapes, 'float32', folder)
  tokenizer = ByteLevelBPE.from_gguf(pretrained.SMOLLM2)
  export.write_tokenizer(tokenizer, False, folder)
  export.write_json(
    folder / huggingface.CONFIG, huggingface.config(model) | export.special_ids(tokenizer)
  )
  return model


def pieces(count: int, tokens: int) -> list[list[int]]:
  """Ids of the first pieces of the README, each of so many tokens."""
  tokenizer = ByteLevelBPE.from_gguf(pretrained.SMOLLM2)
  ids = tokenizer.encode((ROOT / 'README.md').read_text())
  return [list(map(int, ids[i * tokens : (i + 1) * tokens])) for i in range(count)]


def texts(count: int, tokens: int) -> list[str]:
  """The same as text."""
  tokenizer = ByteLevelBPE.from_gguf(pretrained.SMOLLM2)
  return [tokenizer.decode(ids, False) for ids in pieces(count, tokens)]
