"""Text to token ids and back: one protocol, three back ends.

1. `build` makes a tokenizer from the config: `sentencepiece` (trained on the task's texts, or a
   given .model), `bytes`, `gguf` (the byte-level BPE inside a GGUF file), `tokenizer_json`, or
   `saved`, another run's.
2. It is saved into the workdir; a resumed run calls `load`, which sees what was saved.
3. Trusted text (templates) goes through `encode`, text of others through `encode_user`.

A tokenizer is immutable: its fields are exactly the contents of its files, so equal fingerprints
mean equal ids. Left out on purpose: adding special tokens (prompts.py does), truncation, batching,
and encoding what a model wrote (training runs on the ids that were sampled).
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

from reasonrl import records
from reasonrl.tokenizers.byte import Bytes
from reasonrl.tokenizers.byte_level_bpe import ByteLevelBPE
from reasonrl.tokenizers.protocol import Tokenizer
from reasonrl.tokenizers.sentence_piece import MODEL_TYPES, SentencePiece

__all__ = [
  'KINDS',
  'MODEL_TYPES',
  'ByteLevelBPE',
  'Bytes',
  'SentencePiece',
  'Tokenizer',
  'build',
  'load',
]

KINDS = ('bytes', 'gguf', 'saved', 'sentencepiece', 'tokenizer_json')


def build(
  kind: str,
  path: str,
  vocab_size: int,
  model_type: str,
  byte_fallback: bool,
  texts: Iterable[str],
  symbols: Iterable[str],
) -> Tokenizer:
  """The tokenizer that a config asks for.

  Args:
    kind: one of KINDS.
    path: a .model file ('' trains one); a GGUF file ('' or a name, see `pretrained.find_gguf`); a
      tokenizer.json; the tokenizer/ folder of a run; unused by 'bytes'.
    vocab_size: of a trained sentencepiece model, as are the rest; see `SentencePiece.train`.
    model_type: see there.
    byte_fallback: see there.
    texts: see there; a generator is not touched unless a model is trained.
    symbols: see there.

  Raises:
    UserError: unknown `kind`; a missing file; a missing optional package (the message says how to
      install it); what the back ends raise.
  """
  if kind == 'bytes':
    return Bytes()
  if kind == 'saved':
    return load(path)
  if kind == 'gguf':
    return ByteLevelBPE.from_gguf(path)
  if kind == 'tokenizer_json':
    return ByteLevelBPE.from_file(path)
  if kind == 'sentencepiece' and path:
    return SentencePiece.from_file(path)
  if kind == 'sentencepiece':
    return SentencePiece.train(texts, symbols, vocab_size, model_type, byte_fallback)
  raise records.UserError(f'unknown tokenizer {kind!r}; choose from {", ".join(KINDS)}')


def load(directory: str | os.PathLike) -> Tokenizer:
  """Reads back what some tokenizer's `save` wrote into `directory`."""
  backends = (Bytes, ByteLevelBPE, SentencePiece)
  found = [b for b in backends if (pathlib.Path(directory) / b.FILE).exists()]
  if len(found) != 1:
    names = ', '.join(b.FILE for b in backends)
    raise records.UserError(f'{directory} must hold exactly one of {names}; found {len(found)}')
  return found[0].from_file(pathlib.Path(directory) / found[0].FILE)
