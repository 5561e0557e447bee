"""google-tunix: python tunix_sampler.py <folder> <dtype>."""

import functools
import json
import pathlib
import sys

import jax.numpy as jnp
import protocol
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as model_lib
from tunix.models.llama3 import params as params_lib


class Numbers:
  """A tokenizer whose texts are JSON lists of ids."""

  encode = staticmethod(json.loads)
  decode = staticmethod(str)
  bos_id = staticmethod(lambda: 0)  # adds none
  eos_id = staticmethod(lambda: -2)
  pad_id = staticmethod(lambda: -1)


def model_config(folder: str):
  have = json.loads((pathlib.Path(folder) / 'config.json').read_text())
  return model_lib.ModelConfig(
    num_layers=have['num_hidden_layers'],
    vocab_size=have['vocab_size'],
    embed_dim=have['hidden_size'],
    hidden_dim=have['intermediate_size'],
    num_heads=have['num_attention_heads'],
    head_dim=have['hidden_size'] // have['num_attention_heads'],
    num_kv_heads=have['num_key_value_heads'],
    rope_theta=have.get('rope_theta') or have['rope_parameters']['rope_theta'],
    norm_eps=have['rms_norm_eps'],
    weight_tying=True,
  )


def main(folder: str, dtype: str) -> None:
  config = model_config(folder)
  # Version 0.1.7 rotates by the base 1e6 whatever its config says.
  model_lib.apply_rope = functools.partial(model_lib.apply_rope, rope_theta=config.rope_theta)
  model = params_lib.create_model_from_safe_tensors(folder, config, dtype=jnp.dtype(dtype))
  samplers = {}  # by size of the cache

  def generate(prompts, samples, new, temperature, seed):
    size = len(prompts[0]) + new
    if size not in samplers:
      cache = sampler_lib.CacheConfig(size, config.num_layers, config.num_kv_heads, config.head_dim)
      samplers[size] = sampler_lib.Sampler(model, Numbers(), cache)
    found = samplers[size](
      [json.dumps(prompt) for prompt in prompts for _ in range(samples)],
      max_generation_steps=new,
      max_prompt_length=len(prompts[0]),
      temperature=float(temperature),
      top_p=1.0 if temperature else None,
      eos_tokens=[-2],
      seed=seed,
    )
    return [tokens.tolist() for tokens in found.tokens]

  protocol.serve(generate)


if __name__ == '__main__':
  main(*sys.argv[1:])
