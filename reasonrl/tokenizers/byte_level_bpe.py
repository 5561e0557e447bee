"""Byte-level BPE, the tokenizer of most pretrained models: from a GGUF file or a tokenizer.json."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

from reasonrl import pretrained, records
from reasonrl.tokenizers import protocol

# llama.cpp pre-tokenizers that isolate every digit (\p{N}), then apply the GPT-2 pattern.
DIGIT_PRETOKENIZERS = ('codeshell', 'command-r', 'exaone', 'refact', 'smollm', 'starcoder')
GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

# A chat model ends its turn with one of these and a base model its document with another, whichever
# of them the file declares as EOS. Where they exist as special tokens, all of them stop a row.
END_PIECES = ('<|endoftext|>', '<|im_end|>', '<|eot_id|>', '<|end_of_text|>', '<end_of_turn>')


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
    """Rebuilds the tokenizer of a GGUF file; `name` as in `pretrained.find_gguf`.

    llama.cpp isolates every digit *before* the GPT-2 pattern: in 'x  5' both spaces become one
    token. Without that step the last space sticks to the digit and arithmetic text is split in a
    way the model never saw (transformers 5 has this fault).

    Raises:
      UserError: the file's tokenizer is not a byte-level BPE of a known pre-tokenizer.
    """
    path = pretrained.find_gguf(name)
    fields = pretrained.open_gguf(path).fields

    def get(key):
      field = fields.get('tokenizer.' + key)
      return None if field is None else field.contents()

    kind, pre = get('ggml.model'), get('ggml.pre')
    if kind != 'gpt2' or pre not in DIGIT_PRETOKENIZERS:
      raise records.UserError(
        f'{path} has the tokenizer {kind!r} with pre-tokenizer {pre!r}; choose a file with '
        f"'gpt2' and one of {', '.join(DIGIT_PRETOKENIZERS)}, or kind tokenizer_json"
      )
    hf = pretrained.package('tokenizers')
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
    config = json.loads(protocol.read(path.parent / cls.CONFIG))
    jinja = path.parent / 'chat_template.jinja'  # newer models keep the template here
    if jinja.exists():
      config['chat_template'] = jinja.read_text(encoding='utf-8')
    return cls._checked(path, protocol.read(path).decode(), json.dumps(config))

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
    return protocol.fingerprint('byte_level_bpe', contents.encode())

  def encode(self, text: str) -> list[int]:
    return self._trusted.encode(text, add_special_tokens=False).ids

  def encode_user(self, text: str) -> list[int]:
    return self._untrusted.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    return self._trusted.decode(ids, skip_special_tokens=skip_special)

  def id_to_piece(self, i: int) -> str:
    return self._trusted.id_to_token(i)

  def save(self, directory: str | os.PathLike) -> None:
    protocol.write(directory, self.CONFIG, self.config_json.encode())
    protocol.write(directory, self.FILE, self.tokenizer_json.encode())


def _runtime(spec):
  runtime = pretrained.package('tokenizers').Tokenizer.from_str(json.dumps(spec))
  runtime.no_truncation()  # a saved length limit would cut prompts silently
  runtime.no_padding()
  return runtime
