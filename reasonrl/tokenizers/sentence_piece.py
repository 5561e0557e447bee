"""sentencepiece: trained on the texts of a task, or a given .model file."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Iterable, Sequence
from typing import ClassVar

import sentencepiece

from reasonrl import records
from reasonrl.tokenizers import protocol

MODEL_TYPES = ('bpe', 'char', 'unigram')


@dataclasses.dataclass(frozen=True)
class SentencePiece:
  """A sentencepiece model (arXiv 1808.06226).

  User-defined symbols (tags, a task's symbols) are single ids in any text, control symbols only in
  trusted text. A character that the vocabulary cannot express is an error, not <unk>: a policy
  that cannot read its problem would look like a hard problem.
  """

  model: bytes = dataclasses.field(repr=False)  # the contents of the .model file

  FILE: ClassVar[str] = 'tokenizer.model'
  chat_template: ClassVar[None] = None

  @classmethod
  def train(
    cls,
    texts: Iterable[str],
    symbols: Iterable[str],
    vocab_size: int,
    model_type: str,
    byte_fallback: bool,
  ) -> SentencePiece:
    r"""Trains on `texts`; the same input gives the same bytes.

    Args:
      texts: the corpus; every character in it enters the alphabet.
      symbols: strings that stay whole, spaces and all, beside the four tags and '\n'.
      vocab_size: upper bound; a small corpus may give fewer pieces.
      model_type: 'bpe', 'char' or 'unigram'.
      byte_fallback: spend 256 pieces so that any text can be encoded.

    Raises:
      UserError: unknown `model_type`; `vocab_size` too small; an empty corpus.
    """
    if model_type not in MODEL_TYPES:
      raise records.UserError(
        f'unknown model_type {model_type!r}; choose from {", ".join(MODEL_TYPES)}'
      )
    model, whole = io.BytesIO(), (*records.TAGS, '\n', *symbols)
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        # The library sees a space as U+2581 when it looks for them.
        user_defined_symbols=[s.replace(' ', '\u2581') for s in dict.fromkeys(whole)],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        # Text must come back as it went in.
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        # The defaults drop the rarest characters and, silently, every text above 4 kB.
        character_coverage=1.0,
        max_sentence_length=2**24,
        num_threads=1,  # several threads sum in varying order
        minloglevel=2,
      )
    except RuntimeError as error:
      raise records.UserError(
        f'sentencepiece cannot train model_type={model_type} vocab_size={vocab_size} '
        f'byte_fallback={byte_fallback} (takes 256 pieces): {error}'
      ) from error
    return cls(model.getvalue())

  @functools.cached_property
  def _processor(self):
    return sentencepiece.SentencePieceProcessor(model_proto=self.model)

  @functools.cached_property
  def _controls(self) -> dict[str, int]:
    processor = self._processor
    ids = filter(processor.is_control, range(self.vocab_size))
    return {processor.id_to_piece(i): i for i in ids}

  @property
  def vocab_size(self) -> int:
    return self._processor.get_piece_size()

  @property
  def pad_id(self) -> int:
    pad = self._processor.pad_id()
    return self.eos_ids[0] if pad < 0 else pad  # sentencepiece says -1 for 'none'

  @property
  def bos_id(self) -> int | None:
    bos = self._processor.bos_id()
    return None if bos < 0 else bos

  @property
  def eos_ids(self) -> tuple[int, ...]:
    return (self._processor.eos_id(),)

  @functools.cached_property
  def control_ids(self) -> frozenset[int]:
    return frozenset((*self._controls.values(), self._processor.unk_id()))

  @functools.cached_property
  def fingerprint(self) -> str:
    return protocol.fingerprint('sentencepiece', self.model)

  @property
  def verbatim(self) -> bool:
    """The model reads text as it is: no space put in front or taken away, no character replaced."""
    text = ' a  \ufb01 '  # the ligature fi
    return self._processor.normalize(text) == text.replace(' ', '\u2581')

  def encode(self, text: str) -> list[int]:
    ids = []
    for part in protocol.split(text, self._controls):
      ids.extend([self._controls[part]] if part in self._controls else self.encode_user(part))
    return ids

  def encode_user(self, text: str) -> list[int]:
    ids = self._processor.encode(text)
    unknown = self._processor.unk_id()
    # The library spells the space as U+2581, so that character would come back as a space.
    if unknown in ids or '\u2581' in text:
      pieces = zip(self._processor.encode(text, out_type=str), ids, strict=True)
      lost = {piece.replace('\u2581', ' ') for piece, i in pieces if i == unknown}
      lost |= {'\u2581'} & set(text)
      raise records.UserError(
        f'the sentencepiece vocabulary has no {sorted(lost)} (in {text[:80]!r}): the training '
        'texts lack it, vocab_size was too small, or byte_fallback is needed'
      )
    return ids

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    return protocol.decode_runs(self, self._processor.decode, ids, skip_special)

  def id_to_piece(self, i: int) -> str:
    return self._processor.id_to_piece(i)

  def save(self, directory: str | os.PathLike) -> None:
    protocol.write(directory, self.FILE, self.model)

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> SentencePiece:
    """Reads a .model file. Raises UserError if it is none, or defines no EOS."""
    model = protocol.read(path)
    try:
      eos = sentencepiece.SentencePieceProcessor(model_proto=model).eos_id()
    except RuntimeError as error:
      raise records.UserError(f'{path} is not a sentencepiece model') from error
    if eos < 0:
      raise records.UserError(f'{path} defines no end-of-sequence piece')
    return cls(model)
