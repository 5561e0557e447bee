"""Final parameters of a run as a Hugging Face folder.

    python -m reasonrl.export --workdir=runs/a --to=exported/a --phase=rl --dtype=bfloat16

1. config.json and tokenizer/ of the workdir give the model, phases/<phase> its parameters.
2. Tensors are gathered one at a time and written as safetensors; rows of the vocabulary that stand
   for no token are cut off. Process 0 writes.
3. The tokenizer's files follow, generation_config.json and, last, config.json: a folder without it
   is unfinished.

Left out on purpose: the prompt template of the run, unless it was the tokenizer's own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags, logging

from reasonrl import (
  checkpoint,
  command_line,
  logs,
  phases,
  pretrained,
  records,
  sharding,
  steps,
  tables,
  tokenizers,
  train,
  wiring,
)
from reasonrl.models import huggingface

FILE_BYTES = 5 * 10**9  # of tensors per file
DTYPES = ('float32', 'bfloat16')


def write(workdir: str, phase: str, to: str, dtype: str) -> None:
  """Writes the folder and prints what it holds.

  Args:
    workdir: of a run.
    phase: a folder in its phases/; '' = the last finished one.
    to: a new or empty folder.
    dtype: of the tensors, one of DTYPES.

  Raises:
    UserError: no such run or phase, a folder with files in it, a model that no Hugging Face
      architecture describes, or no package safetensors.
  """
  source, to = pathlib.Path(workdir).expanduser(), pathlib.Path(to).expanduser()
  if to.exists() and (not to.is_dir() or any(to.iterdir())):
    raise records.UserError(f'{str(to)!r} exists and is not an empty folder')
  config = ml_collections.ConfigDict(logs.read_config(source))
  kept = phases.finished(config, steps.STEPS, source)
  pretrained.package('safetensors')  # not after minutes of loading
  phase = phase or next(reversed(kept))
  section = config[tables.lookup(kept, phase, 'phase')]
  tokenizer = tokenizers.load(source / 'tokenizer')
  model = wiring.make_model(train.TABLES['model'], config.models[section.trains], tokenizer)
  whole = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)  # nothing but tokens
  described = huggingface.config(whole) | {'torch_dtype': dtype} | special_ids(tokenizer)

  mesh, key = sharding.make_mesh(1, -1, 1), jax.random.key(0)
  target = sharding.abstract(jax.eval_shape(model.init, key), model.sharding_rules, mesh)
  names = huggingface.names(dataclasses.asdict(model))
  tensors = by_name(names, checkpoint.load_params(source / 'phases' / phase, target))
  write_weights(tensors, by_name(names, jax.eval_shape(whole.init, key)), dtype, to)
  if jax.process_index() > 0:
    return
  note = write_tokenizer(tokenizer, config.prompt.add_bos, to)
  # Control tokens other than EOS are never sampled, so training has not taught the model to.
  generation = special_ids(tokenizer)
  generation['suppress_tokens'] = sorted(tokenizer.control_ids - set(tokenizer.eos_ids)) or None
  write_json(to / 'generation_config.json', generation)
  write_json(to / huggingface.CONFIG, described)
  print(f'{to}: {described["architectures"][0]}, {dtype}, the parameters of {phase}; {note}')


def write_weights(tensors: dict[str, Any], wanted: dict[str, Any], dtype: str, to) -> None:
  """Writes tensor name -> array, cut to the shapes of `wanted`; empties `tensors` on the way."""
  sizes = {name: x.size * jnp.dtype(dtype).itemsize for name, x in wanted.items()}
  files, writes = split(sizes, FILE_BYTES), jax.process_index() == 0
  if writes:
    to.mkdir(parents=True, exist_ok=True)
  for file, inside in files.items():
    held = {}
    for name in inside:
      array = sharding.fetch(tensors.pop(name).astype(dtype))  # every process takes part
      if writes:
        held[name] = np.ascontiguousarray(array[: wanted[name].shape[0]])
    if writes:
      save_file = pretrained.package('safetensors.numpy').save_file
      save_file(held, to / file, metadata={'format': 'pt'})  # old readers insist on the metadata
  if writes and len(files) > 1:
    weight_map = {name: file for file, inside in files.items() for name in inside}
    total = {'total_size': sum(sizes.values())}
    write_json(to / huggingface.INDEX, {'metadata': total, 'weight_map': weight_map})


def by_name(names: dict[str, str], params) -> dict[str, Any]:
  """Tensor name -> leaf of a parameter tree."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {names[sharding.path_of(path)]: leaf for path, leaf in leaves}


def split(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
  """File -> its tensors, in order; at most `limit` bytes in a file of more than one."""
  groups, filled = [], limit
  for name, size in sizes.items():
    if filled + size > limit:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += size
  if len(groups) == 1:
    return {huggingface.WEIGHTS: groups[0]}
  return {
    f'model-{i:05d}-of-{len(groups):05d}.safetensors': group for i, group in enumerate(groups, 1)
  }


def special_ids(tokenizer) -> dict[str, Any]:
  """The ids as config.json and generation_config.json name them."""
  eos = tokenizer.eos_ids
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': list(eos) if len(eos) > 1 else eos[0],
    'pad_token_id': tokenizer.pad_id,
  }


def write_tokenizer(tokenizer, add_bos: bool, to: pathlib.Path) -> str:
  """Writes the files that give the same ids in transformers, or none; says which."""
  if isinstance(tokenizer, tokenizers.ByteLevelBPE):
    tokenizer.save(to)
    return f'with {tokenizer.FILE}'
  if isinstance(tokenizer, tokenizers.SentencePiece) and tokenizer.verbatim:
    tokenizer.save(to)
    piece = lambda i: None if i is None else tokenizer.id_to_piece(i)
    # This class reads the model's own algorithm (LlamaTokenizer would run any as a BPE). Equally
    # likely segmentations of a unigram model are the one case in which it may choose another.
    fields = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'bos_token': piece(tokenizer.bos_id),
      'eos_token': piece(tokenizer.eos_ids[0]),
      'pad_token': piece(tokenizer.pad_id),
      'add_bos_token': add_bos,
      'clean_up_tokenization_spaces': False,
    }
    write_json(to / 'tokenizer_config.json', fields)
    return f'with {tokenizer.FILE}, which transformers 5 reads by sentencepiece and protobuf'
  return 'WITHOUT a tokenizer: none of Hugging Face gives the ids of this one, see tokenizers.py'


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')


def main(argv: list[str]) -> None:
  given = flags.FLAGS
  if argv[1:] or not given.workdir or not given.to:
    raise records.UserError('give --workdir=FOLDER --to=FOLDER, and --phase, --dtype if need be')
  if 'JAX_PLATFORMS' not in os.environ:
    jax.config.update('jax_platforms', 'cpu')  # an accelerator may belong to a run
  write(given.workdir, given.phase, given.to, given.dtype)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run.')
  flags.DEFINE_string('to', None, 'Folder to write, new or empty.')
  flags.DEFINE_string('phase', '', 'Which final parameters, such as rl; the last if empty.')
  flags.DEFINE_enum(
    'dtype', 'float32', DTYPES, 'Of the tensors. Small updates can round away in bfloat16.'
  )
  flags.FLAGS.verbosity = logging.WARNING  # absl would show every INFO of Orbax
  command_line.guarded(main, flags.FLAGS, '')
