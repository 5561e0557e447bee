"""What became of one field of a peer's config."""

from __future__ import annotations

from typing import Any, NamedTuple

EXACT, APPROXIMATE, UNSUPPORTED, IGNORED = 'exact', 'approximate', 'unsupported', 'ignored'


class Line(NamedTuple):
  """What became of one field of the peer."""

  field: str
  value: Any
  status: str
  ours: dict[str, Any]  # field of the reinforce section -> value
  note: str
  given: bool  # or the peer's default
