"""UTF-8 bytes as tokens: no vocabulary to train, any text."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import ClassVar

from reasonrl import records
from reasonrl.tokenizers import protocol


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
    return protocol.fingerprint('bytes', json.dumps(self.SPECIALS).encode())

  def encode(self, text: str) -> list[int]:
    return self._encode(text, self.SPECIALS)

  def encode_user(self, text: str) -> list[int]:
    return self._encode(text, records.TAGS)

  def _encode(self, text, specials):
    ids = []
    for part in protocol.split(text, specials):
      if part in specials:
        ids.append(self.SPECIALS.index(part))
      else:
        ids.extend(byte + len(self.SPECIALS) for byte in part.encode())
    return ids

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    return protocol.decode_runs(self, self._decode, ids, skip_special)

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
    protocol.write(directory, self.FILE, json.dumps(self.SPECIALS).encode())

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> Bytes:
    saved = tuple(json.loads(protocol.read(path)))
    if saved != cls.SPECIALS:
      raise records.UserError(
        f'{path} was saved with specials {saved}; this version has {cls.SPECIALS}'
      )
    return cls()
