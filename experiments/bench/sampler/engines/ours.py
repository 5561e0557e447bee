"""Ours: python ours.py <folder> <dtype>."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import protocol

from reasonrl import sampling, sharding, types
from reasonrl.configs import common
from reasonrl.models import decoder, huggingface


def load(folder: str, dtype: str):
  """The decoder and its parameters, in the dtype."""
  fields, params = huggingface.read(pathlib.Path(folder))
  known = {field.name for field in dataclasses.fields(decoder.Decoder)}
  config = common.model('smollm2_135m').to_dict() | fields
  config |= {'param_dtype': dtype, 'compute_dtype': dtype}
  model = decoder.Decoder(**{name: value for name, value in config.items() if name in known})
  return model, jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), params)


def main(folder: str, dtype: str) -> None:
  model, params = load(folder, dtype)
  sampler = sampling.Sampler(model, sharding.make_mesh(1, 1, 1), (), **common.sampler())

  def generate(prompts, samples, new, temperature, seed):
    prompts = np.asarray(prompts, np.int32)
    row = np.arange(len(prompts) * samples)
    requests = types.Requests(
      tokens_PT=prompts,
      length_P=np.full(len(prompts), prompts.shape[1], np.int32),
      prompt_R=(row // samples).astype(np.int32),
      key_R=sampling.row_keys(seed, 'eval', 0, 0, 0, row, 0, 0),
      max_new_R=np.full(row.size, new, np.int32),
      numbers={},
      temperature_R=None,
    )
    never = (model.vocab_size,)  # ends a sample
    spec = types.Spec(float(temperature), 0, 1.0, 0.0, 0, never, ())
    found = sampler.generate(params, requests, spec, 0, lambda: None)
    start = prompts.shape[1]
    return found.tokens_RS[:, start : start + new].tolist()

  protocol.serve(generate)


if __name__ == '__main__':
  main(*sys.argv[1:])
