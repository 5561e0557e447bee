"""What every tokenizer offers, and what the back ends share."""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

from reasonrl import records


class Tokenizer(Protocol):
  """What the rest of the code may use of a tokenizer."""

  vocab_size: int
  pad_id: int  # fills rows; never used to recognise padding
  bos_id: int | None
  eos_ids: tuple[int, ...]  # all of them stop a row; the first ends training rows
  control_ids: frozenset[int]  # ids that stand for no text: EOS, BOS, padding, unknown, turn marks
  chat_template: str | None  # Jinja source
  fingerprint: str  # sha256 over kind and contents

  def encode(self, text: str) -> list[int]:
    """Ids of trusted text: control strings in it become control ids. Nothing is added."""

  def encode_user(self, text: str) -> list[int]:
    """Ids of untrusted text: control strings in it stay plain characters."""

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    """Text of ids; control ids are dropped or spelt out; broken UTF-8 becomes U+FFFD."""

  def id_to_piece(self, i: int) -> str:
    """One id in readable form."""

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the file(s) that `load` reads."""


def split(text, strings):
  """`text` cut so that every occurrence of one of `strings` is a part of its own."""
  pattern = '|'.join(map(re.escape, strings))
  return [part for part in re.split(f'({pattern})', text) if part]


def decode_runs(tokenizer, decode, ids, skip_special):
  """Decodes runs of text ids with `decode`; control ids are dropped or spelt out."""
  text = []
  for control, run in itertools.groupby(ids, tokenizer.control_ids.__contains__):
    if not control:
      text.append(decode(list(run)))
    elif not skip_special:
      text.extend(map(tokenizer.id_to_piece, run))
  return ''.join(text)


def fingerprint(kind, contents):
  return hashlib.sha256(kind.encode() + b'\0' + contents).hexdigest()


def read(path):
  try:
    return pathlib.Path(path).expanduser().read_bytes()
  except FileNotFoundError as error:
    raise records.UserError(f'no tokenizer file {str(path)!r}') from error


def write(directory, name, contents):
  """Writes a whole file or none, so that a killed run leaves nothing half-written to `load`."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  temporary = directory / (name + '.tmp')
  temporary.write_bytes(contents)
  os.replace(temporary, directory / name)
