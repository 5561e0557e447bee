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

import dataclasses
import os
import pathlib
from collections.abc import Iterable

from reasonrl import records
from reasonrl.tokenizers.byte import Bytes
from reasonrl.tokenizers.byte_level_bpe import ByteLevelBPE
from reasonrl.tokenizers.protocol import Tokenizer
from reasonrl.tokenizers.sentence_piece import MODEL_TYPES, SentencePiece

__all__ = [
  'MODEL_TYPES',
  'TOKENIZERS',
  'ByteLevelBPE',
  'Bytes',
  'SentencePiece',
  'Settings',
  'Tokenizer',
  'build',
  'load',
]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Which tokenizer; every default is in `configs/common.py`."""

  kind: str  # a key of TOKENIZERS
  path: str  # of the file, GGUF name or folder that the kind reads; '' trains a sentencepiece model
  vocab_size: int  # of a trained sentencepiece model, as are the rest; see `SentencePiece.train`
  model_type: str
  byte_fallback: bool
  corpus_examples: int  # examples of the task to train on


def _sentencepiece(cfg: Settings, texts, symbols) -> SentencePiece:
  if cfg.path:
    return SentencePiece.from_file(cfg.path)
  return SentencePiece.train(texts, symbols, cfg.vocab_size, cfg.model_type, cfg.byte_fallback)


TOKENIZERS = {  # kind -> (settings, texts, symbols) -> tokenizer
  'bytes': lambda cfg, texts, symbols: Bytes(),
  'gguf': lambda cfg, texts, symbols: ByteLevelBPE.from_gguf(cfg.path),
  'saved': lambda cfg, texts, symbols: load(cfg.path),
  'sentencepiece': _sentencepiece,
  'tokenizer_json': lambda cfg, texts, symbols: ByteLevelBPE.from_file(cfg.path),
}


def build(cfg: Settings, texts: Iterable[str], symbols: Iterable[str]) -> Tokenizer:
  """The tokenizer that a config asks for.

  Args:
    cfg: its section.
    texts: the corpus; a generator is not touched unless a model is trained.
    symbols: strings that stay whole in a trained model.

  Raises:
    UserError: unknown kind; a missing file; a missing optional package (the message says how to
      install it); what the back ends raise.
  """
  if cfg.kind not in TOKENIZERS:
    choices = ', '.join(TOKENIZERS)
    raise records.UserError(f'unknown tokenizer {cfg.kind!r}; choose from {choices}')
  return TOKENIZERS[cfg.kind](cfg, texts, symbols)


def load(directory: str | os.PathLike) -> Tokenizer:
  """Reads back what some tokenizer's `save` wrote into `directory`."""
  backends = (Bytes, ByteLevelBPE, SentencePiece)
  found = [b for b in backends if (pathlib.Path(directory) / b.FILE).exists()]
  if len(found) != 1:
    names = ', '.join(b.FILE for b in backends)
    raise records.UserError(f'{directory} must hold exactly one of {names}; found {len(found)}')
  return found[0].from_file(pathlib.Path(directory) / found[0].FILE)
