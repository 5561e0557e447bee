"""Where an update that was not finite went wrong, and the files from which `replay` recomputes it.

1. `find` recomputes an update with the parameters that it met, and looks for the first thing that
   is not finite: parameters, denominators, what lies between them and the loss at every scored
   token, gradients.
2. `Dumps.write` keeps what it takes to do that again: DUMP.npz (micro-batches, denominators),
   DUMP.json (its place, what was found), DUMP.params; the config is the workdir's.
3. `read` is the way back.

Left out on purpose: looking inside the network. Where finite parameters give an activation that is
not finite, the first token whose log-probability shows it is named. With several processes the
dumps are written, one for each process, and `find` is left to the replay.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reasonrl import checkpoint, learner, records, sharding, types

KEPT_PARAMETERS = 3  # parameter trees that a run keeps: one that fails often must not fill the disk


@dataclasses.dataclass(frozen=True)
class Token:
  """A scored token and all that was computed for it."""

  micro_batch: int
  row: int
  slot: int  # of the scored tokens of the row
  token_id: int
  text: str
  values: dict[str, float]  # logp, weight, adv, ..., loss and its derivatives, in this order


@dataclasses.dataclass(frozen=True)
class Origin:
  """The first thing that was not finite, and the first token at which it showed."""

  quantity: str  # 'parameter', 'denominator', 'gradient', or a key of `Token.values`
  term: str  # the term of the loss that it belongs to, '' if to all: 'GRPO.token_loss'
  detail: str  # 'is nan'
  token: Token | None

  def __str__(self) -> str:
    """'adv is nan, first at token 17 (' the'): micro-batch 1, row 3, slot 5'."""
    of, at = f' of {self.term}' if self.term else '', self.token
    what = f'{self.quantity}{of} {self.detail}'
    if at is None:
      return what
    place = f'micro-batch {at.micro_batch}, row {at.row}, slot {at.slot}'
    return f'{what}, first at token {at.token_id} ({at.text!r}): {place}'


@dataclasses.dataclass(frozen=True)
class Report:
  """What `find` found."""

  finite: bool  # the loss and the gradient norm of the update
  origin: Origin | None  # None if it is finite
  micro_batches: tuple[dict[str, float], ...]  # 'loss', 'grad_norm', 'bad_tokens' of each alone


# ------------------------------------------------------------------------------------ find


def find(student: learner.Learner, params, batches, denominators, tokenizer) -> Report:
  """Recomputes an update and looks for the first thing that is not finite.

  Args:
    student: the learner of the phase.
    params: the parameters before the update.
    batches: its host micro-batches.
    denominators: one per term.
    tokenizer: for the text of the token.
  """
  rows, token, blame = [], None, None
  for b, batch in enumerate(batches):
    bad_BM, values = token_values(student, params, batch)
    grads, loss, _ = student.gradients(params, [batch], denominators)
    loss, norm = float(loss), float(learner.global_norm(grads))
    rows.append({'loss': loss, 'grad_norm': norm, 'bad_tokens': int(bad_BM.sum())})
    if blame is not None:
      continue
    if bad_BM.any():
      where = tuple(np.argwhere(bad_BM)[0])
      term, name = next(key for key, x in values.items() if not np.isfinite(x[where]))
      blame = (name, term, f'is {values[term, name][where]:g}')
    elif not math.isfinite(loss) or not math.isfinite(norm):
      where = _bisect(student, params, batch, denominators)
      leaf = next(iter(nonfinite(grads)), None)
      blame = ('gradient', '', f'of {leaf} is not finite' if leaf else 'has a norm that overflows')
    else:
      continue
    token = None if where is None else _token(batch, values, (b, *where), tokenizer)
  grads, loss, _ = student.gradients(params, batches, denominators)
  finite = math.isfinite(float(loss)) and math.isfinite(float(learner.global_norm(grads)))
  wrong = [k for k, d in enumerate(denominators) if not math.isfinite(d) or d == 0]
  if damaged := nonfinite(params):
    path, count = next(iter(damaged.items()))
    blame = ('parameter', '', f'{path} has {count} entries that are not finite')
  elif wrong:
    blame = ('denominator', _name(student.terms[wrong[0]]), f'is {denominators[wrong[0]]:g}')
  elif blame is None:
    blame = ('gradient', '', 'overflows, though that of every micro-batch is finite')
  return Report(finite, None if finite else Origin(*blame, token), tuple(rows))


@jax.jit
def _counts(tree):
  return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), tree)


def nonfinite(tree) -> dict[str, int]:
  """path -> entries that are not finite, of the leaves that have any."""
  counts = jax.tree_util.tree_leaves_with_path(jax.device_get(_counts(tree)))
  return {sharding.path_of(path): int(n) for path, n in counts if n}


def token_values(student: learner.Learner, params, batch: types.Batch):
  """What lies between parameters and loss at the scored tokens, each array [B, M].

  Returns:
    which tokens have a log-probability, loss or derivative that is not finite;
    {(term, name): values} in the order in which they come about; term '' where all terms share it.
  """
  whole = student.put(params, batch)
  out = student.score(params, whole)
  logp_M, entropy_M = out.logp.reshape(-1), out.entropy.reshape(-1)
  aux = {name: x.reshape(-1) for name, x in whole.aux.items() if name not in learner.SUPPORT}
  shared = {'logp': logp_M, 'weight': aux['weight'], **aux, 'entropy': entropy_M}
  values = {('', name): x for name, x in shared.items()}
  bad_M = ~jnp.isfinite(logp_M)
  for term in student.terms:
    its = aux | {'weight': aux[term.weight]}
    loss_fn = lambda logp_M, entropy_M, fn=term.token_loss, its=its: learner.weighted(
      fn, logp_M, entropy_M, its
    )
    loss_M, pull, metrics = jax.vjp(loss_fn, logp_M, entropy_M, has_aux=True)
    dlogp_M, dentropy_M = pull(jnp.ones_like(loss_M))
    ends = {'loss': loss_M, 'dloss/dlogp': dlogp_M, 'dloss/dentropy': dentropy_M}
    for name, x in {**metrics, **ends}.items():
      if name not in shared:
        values[_name(term), name] = x
    for x in ends.values():
      bad_M |= ~jnp.isfinite(x)
  host = lambda x: np.asarray(x).reshape(batch.index_BM.shape)
  return host(bad_M) & trained(student, whole), {key: host(x) for key, x in values.items()}


def trained(student: learner.Learner, batch: types.Batch) -> np.ndarray:
  """bool [B, M]: a term of the loss has this token."""
  return np.any([np.asarray(batch.aux[term.weight]) > 0 for term in student.terms], axis=0)


def _name(term: learner.Term) -> str:
  """'GRPO.token_loss'."""
  return getattr(term.token_loss, '__qualname__', repr(term.token_loss))


def _token(batch: types.Batch, values, where, tokenizer) -> Token:
  b, row, slot = map(int, where)
  i = int(batch.tokens_BT[row, batch.index_BM[row, slot]])
  there = {f'{term}: {name}' if term else name: x for (term, name), x in values.items()}
  there = {name: float(x[row, slot]) for name, x in there.items()}
  return Token(b, row, slot, i, tokenizer.id_to_piece(i), there)


def _bisect(student, params, batch: types.Batch, denominators):
  """(row, slot) of a token whose gradient is not finite with all others masked, or None."""

  def bad(slots) -> bool:
    at, masks = tuple(slots.T), {}
    for term in student.terms:
      masks[term.weight] = np.zeros_like(batch.aux[term.weight])
      masks[term.weight][at] = batch.aux[term.weight][at]
    masked = dataclasses.replace(batch, aux={**batch.aux, **masks})
    grads, loss, _ = student.gradients(params, [masked], denominators)
    return not math.isfinite(float(loss)) or not math.isfinite(float(learner.global_norm(grads)))

  return first_bad(bad, np.argwhere(trained(student, batch)))


def first_bad(bad: Callable[[Any], bool], items):
  """An item that is bad alone, by halving; None if none is, or if no items at all are bad too."""
  if bad(items[:0]):
    return None
  while len(items) > 1:
    half = len(items) // 2
    items = next((part for part in (items[:half], items[half:]) if bad(part)), items[:0])
  return items[0] if len(items) else None


# ------------------------------------------------------------------------------------ files


class Dumps:
  """The folder nonfinite/ of a run."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._params = ''  # folder of the parameters of the update before, if it was skipped too

  def write(self, name: str, place: dict, parts, params, update, skipped: int) -> str:
    """Keeps an update that was skipped; returns a line about it.

    Args:
      name: of the files, unique in the run.
      place: where the update was made, for the .json: at least 'phase'.
      parts: (learner, tokenizer).
      params: the parameters that it met, and left as they were.
      update: (host micro-batches, denominators).
      skipped: how many updates in a row were skipped, with this one.
    """
    student, tokenizer = parts
    batches, denominators = update
    self._folder.mkdir(parents=True, exist_ok=True)
    if skipped == 1 or not self._params:  # else they are those of the dump before
      self._params = f'{name}.params'
      others = {path.name for path in self._folder.glob('*.params')} - {self._params}
      if len(others) < KEPT_PARAMETERS:
        checkpoint.save_params(self._folder / self._params, params)
    alone = jax.process_count() == 1
    path = self._folder / (name if alone else f'{name}-p{jax.process_index()}')
    report = find(student, params, batches, denominators, tokenizer) if alone else None
    arrays = {'denominators': np.asarray(denominators, np.float32)}
    for b, batch in enumerate(batches):
      for key_path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        arrays[f'{b}/{sharding.path_of(key_path)}'] = np.asarray(leaf)
    np.savez_compressed(path.with_name(f'{path.name}.npz'), **arrays)
    found = None if report is None else dataclasses.asdict(report)
    text = json.dumps({**place, 'params': self._params, 'report': found}, indent=2)
    path.with_name(f'{path.name}.json').write_text(text + '\n', encoding='utf-8')
    said = 'not finite' if report is None else str(report.origin or 'finite when recomputed')
    return f'{said}; again: python -m reasonrl.main --replay={path}.npz'


def read(path: pathlib.Path):
  """The .json of a dump, its micro-batches and denominators, and the folder of its parameters.

  Raises:
    UserError: it is no dump, or its parameters were not kept.
  """
  about = path.with_suffix('.json')
  if path.suffix != '.npz' or not path.is_file() or not about.is_file():
    raise records.UserError(f'--replay={str(path)!r} is not a dump: WORKDIR/nonfinite/NAME.npz')
  place = json.loads(about.read_text(encoding='utf-8'))
  params = path.parent / place['params']
  if not params.is_dir():
    raise records.UserError(
      f'--replay={str(path)!r}: its parameters were not kept, only those of the first '
      f'{KEPT_PARAMETERS} failures of a run'
    )
  with np.load(path) as saved:
    arrays = {name: saved[name] for name in saved.files}
  denominators = tuple(float(d) for d in arrays.pop('denominators'))
  batches = []
  for b in range(len({name.split('/')[0] for name in arrays})):
    mine = {n.removeprefix(f'{b}/'): x for n, x in arrays.items() if n.startswith(f'{b}/')}
    aux = {n.removeprefix('aux/'): mine.pop(n) for n in list(mine) if n.startswith('aux/')}
    mine.setdefault('prefixes_BT', None)  # which is no array
    mine.setdefault('before_BM', mine['index_BM'] - 1)  # dumps from before it was written
    batches.append(types.Batch(**mine, aux=aux))
  return place, batches, denominators, params
