"""The algorithm-blind learner: packs rows, accumulates gradients over micro-batches, applies them.

1. `sequences` cuts padding off, `pack` puts sequences side by side into micro-batches of one shape.
2. `Learner.accumulate` adds one micro-batch's gradients to a donated sum.
3. `Learner.apply` clips and updates; if the loss or a gradient is not finite, the step is skipped.
4. `Learner.score` is the forward-only path: log-probability and entropy of given tokens.
5. `reduce_reports` turns what the device reported into metrics, on the host, one step later.

The loss is a list of terms, each a sum over scored tokens of weight x token loss, divided by a
denominator computed once for the whole optimizer step and passed in: micro-batching, packing and
sharding cannot change it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from reasonrl import ops, sharding, types


class Out(NamedTuple):
  """What a token loss sees of the policy: float32, one number per scored token."""

  logp: jax.Array
  entropy: jax.Array


@dataclasses.dataclass(frozen=True)
class Term:
  """One summand of the loss, on one head.

  token_loss: (out, aux) -> (loss_M, {metric: [M]}), elementwise, without weights.
  prepare: None, or (logp_BM, batch) -> {name: [B, M]}, more aux arrays for sequence-level
    quantities, at the price of a scoring pass; compiled together with it.
  """

  head: str
  token_loss: Callable
  prepare: Callable | None


def nll(out: Out, aux) -> tuple[jax.Array, dict]:
  """-log p of the scored token: pretraining, SFT and rejection-sampled data."""
  del aux
  return -out.logp, {}


def sequences(tokens_BT, length_B, aux_BT: dict) -> list[types.Sequence]:
  """Rows -> sequences; a token is scored where aux_BT['weight'] > 0."""
  out = []
  for i, n in enumerate(length_B):
    index = np.flatnonzero(aux_BT['weight'][i, :n] > 0)
    aux = {name: np.asarray(x[i, index], np.float32) for name, x in aux_BT.items()}
    out.append(types.Sequence(np.asarray(tokens_BT[i, :n], np.int32), index, aux))
  return out


def pack(seqs: list[types.Sequence], row_length: int, rows: int, multiple: int):
  """Sequences -> micro-batches of `rows` rows by first fit, longest first.

  The number of scored slots per row is the largest any row needs, rounded up to a quarter of the
  row (few shapes, few compilations) and to `multiple`.

  Args:
    seqs: sequences of at most row_length tokens.
    row_length: T of a packed row.
    rows: rows per micro-batch on this process.
    multiple: the scored slots of a row are a multiple of this (the mesh's tensor axis).

  Returns:
    list of host Batches, and for every sequence its (micro-batch, row, first scored slot).

  Raises:
    ValueError: a sequence is longer than row_length, or scores its first token, which nothing
      predicts.
  """
  for i, seq in enumerate(seqs):
    if seq.index_N.size and seq.index_N.min() == 0:
      raise ValueError(f'sequence {i}: the first token of a segment cannot be scored')
  order = sorted(range(len(seqs)), key=lambda i: -seqs[i].tokens_L.size)
  if seqs[order[0]].tokens_L.size > row_length:
    longest = seqs[order[0]].tokens_L.size
    raise ValueError(f'a sequence of {longest} tokens does not fit a packed row of {row_length}')
  free, content = np.zeros(len(seqs), np.int64) + row_length, [[] for _ in seqs]
  for i in order:
    row = int(np.argmax(free >= seqs[i].tokens_L.size))
    free[row] -= seqs[i].tokens_L.size
    content[row].append(i)
  content = [c for c in content if c]
  step = -(-row_length // 4)
  # Every process must compile and run the same programs, so the shapes are agreed on.
  need = sharding.agree(max(max(sum(seqs[i].index_N.size for i in c) for c in content), 1))
  slots = -(-need // step) * step
  slots += -slots % multiple

  names = list(seqs[0].aux)
  batches, place = [], [None] * len(seqs)
  for start in range(0, sharding.agree(-(-len(content) // rows)) * rows, rows):
    ints = lambda width, fill: np.full((rows, width), fill, np.int32)  # noqa: E731
    tokens, positions, segments = ints(row_length, 0), ints(row_length, 0), ints(row_length, 0)
    index = ints(slots, 1)
    aux = {name: np.zeros((rows, slots), np.float32) for name in names}
    for r, members in enumerate(content[start : start + rows]):
      at = slot = 0
      for segment, i in enumerate(members, start=1):
        seq, n = seqs[i], seqs[i].index_N.size
        span = slice(at, at + seq.tokens_L.size)
        tokens[r, span], segments[r, span] = seq.tokens_L, segment
        positions[r, span] = np.arange(seq.tokens_L.size)
        index[r, slot : slot + n] = seq.index_N + at
        for name in names:
          aux[name][r, slot : slot + n] = seq.aux[name]
        place[i] = (len(batches), r, slot)
        at, slot = at + seq.tokens_L.size, slot + n
    batches.append(types.Batch(tokens, positions, segments, index, aux))
  return batches, place


def unpack(values, seqs: list[types.Sequence], place, shape) -> np.ndarray:
  """Per-micro-batch [B, M] values -> float32 [len(seqs), T], 0 where nothing was scored."""
  out = np.zeros(shape, np.float32)
  for i, (batch, row, slot) in enumerate(place):
    n = seqs[i].index_N.size
    out[i, seqs[i].index_N] = values[batch][row, slot : slot + n]
  return out


@dataclasses.dataclass(frozen=True)
class Learner:
  """The compiled stages of an update, for one model, mesh, loss and optimizer."""

  model: object
  mesh: Mesh
  tx: optax.GradientTransformation
  ema_decay: float | None
  terms: tuple[Term, ...]
  form: tuple  # see kernels.policy_loss: scale, softcap, temperature, compute dtype
  forbidden: tuple[int, ...]
  loss_chunk: int  # scored tokens whose logits exist at a time

  def init(self, params) -> types.TrainState:
    """A fresh train state around these parameters, placed by the model's rules."""

    return jax.jit(self._fresh)(params)

  def abstract(self) -> types.TrainState:
    """Shapes, dtypes and shardings of the train state, without computing one."""
    params = jax.eval_shape(self.model.init, jax.random.key(0))
    shapes = jax.eval_shape(self._fresh, params)
    return sharding.abstract(shapes, self.model.sharding_rules, self.mesh)

  def _fresh(self, params):
    ema = None if self.ema_decay is None else jax.tree.map(jnp.copy, params)
    zero = jnp.zeros((), jnp.int32)
    return self._place(types.TrainState(params, self.tx.init(params), ema, zero, zero))

  def update(self, state: types.TrainState, batches: list[types.Batch], denominators):
    """One optimizer step over host micro-batches.

    Args:
      state: donated.
      batches: from `pack`, at least one.
      denominators: one float per term: the global ones of this optimizer step.

    Returns:
      the new state, and reports (device values; see `reduce_reports`).
    """
    replicated = sharding.replicated(self.mesh)
    denominators = jax.device_put(tuple(np.float32(d) for d in denominators), replicated)
    reports = []
    with jax.transfer_guard('disallow'):  # whatever crosses to the device is put there on purpose
      grads = self._zeros(state.params)
      for batch in batches:
        batch = sharding.put_rows(batch, self.mesh)
        for term in self.terms:
          if term.prepare is not None:
            batch = self._prepared(term.prepare, state.params, batch)
        grads, report = self.accumulate(state.params, grads, batch, denominators)
        reports.append(report)
      # Summed here: a list would compile `apply` anew for every number of micro-batches.
      loss = functools.reduce(jnp.add, [report['loss'] for report in reports])
      state, final = self.apply(state, grads, loss)
    return state, (reports, final)

  @functools.partial(jax.jit, static_argnums=0)
  def _zeros(self, params):
    return self._place(jax.tree.map(jnp.zeros_like, params))

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def accumulate(self, params, grads, batch: types.Batch, denominators):
    """grads + the gradient of this micro-batch's share of the loss; and its report."""

    def loss_fn(params):
      hidden_MD, targets_M, aux = self._scored(params, batch)
      loss, report = 0.0, {'tokens': jnp.sum(aux['weight'] > 0)}
      for term, denominator in zip(self.terms, denominators, strict=True):
        total, metrics = ops.token_loss(
          hidden_MD,
          self.model.head(params),
          ops.forbid(self.model.vocab_size, self.forbidden),
          targets_M,
          aux,
          functools.partial(_weighted, term.token_loss),
          self.form,
          self.loss_chunk,
          self.mesh,
        )
        loss = loss + total / denominator
        report |= metrics
      return loss, {'loss': loss, **report}

    new, report = jax.grad(loss_fn, has_aux=True)(params)
    mask_M = batch.aux['weight'].reshape(-1) > 0
    for name, value in report.items():
      if value.ndim and name != 'mismatch':  # [M] -> what the metric is: a maximum, or a sum
        value = jnp.where(mask_M, value, 0.0)
        report[name] = value.max() if name.endswith('_max') else value.sum()
    return self._place(jax.tree.map(jnp.add, grads, new)), report

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def apply(self, state: types.TrainState, grads, loss):
    """Updates the state, or leaves it as it is if the loss or the gradient norm is not finite."""
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
    grad_norm = jnp.sqrt(sum(squares))
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      d = self.ema_decay
      ema = jax.tree.map(lambda e, p: d * e + (1.0 - d) * p, ema, params)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
    new = types.TrainState(
      params=keep(params, state.params),
      opt_state=keep(opt_state, state.opt_state),
      ema=keep(ema, state.ema),
      step=state.step + 1,
      skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    return self._place(new), {'grad_norm': grad_norm, 'finite': finite, 'skipped': new.skipped}

  @functools.partial(jax.jit, static_argnums=0)
  def score(self, params, batch: types.Batch) -> Out:
    """Log-probability and entropy of the scored tokens, [B, M] each; forward only."""
    hidden_MD, targets_M, _ = self._scored(params, batch)
    out = ops.token_logps(
      hidden_MD,
      self.model.head(params),
      ops.forbid(self.model.vocab_size, self.forbidden),
      targets_M,
      self.form,
      self.loss_chunk,
      self.mesh,
    )
    return Out(*(x.reshape(batch.index_BM.shape) for x in out))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def _prepared(self, prepare, params, batch: types.Batch) -> types.Batch:
    """The batch with the aux arrays that `prepare` makes of a scoring pass, as one program."""
    more = prepare(self.score(params, batch).logp, batch)
    return dataclasses.replace(batch, aux={**batch.aux, **more})

  def _scored(self, params, batch):
    """Hidden state before each scored token, the tokens, and aux: all flattened to [M]."""
    hidden_BTD, _ = self.model.hidden(
      params, batch.tokens_BT, batch.positions_BT, batch.segments_BT, None
    )
    hidden_BMD = jnp.take_along_axis(hidden_BTD, batch.index_BM[:, :, None] - 1, axis=1)
    targets_BM = jnp.take_along_axis(batch.tokens_BT, batch.index_BM, axis=1)
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    return flat(hidden_BMD), flat(targets_BM), jax.tree.map(flat, batch.aux)

  def _place(self, tree):
    rules = self.model.sharding_rules
    return jax.lax.with_sharding_constraint(tree, sharding.param_shardings(tree, rules, self.mesh))


def _weighted(token_loss, logp, entropy, aux):
  """Weight x token loss, exactly 0 where the weight is 0; and the metrics every term reports."""
  loss, metrics = token_loss(Out(logp, entropy), aux)
  metrics = {**metrics, 'entropy': entropy}
  if 'sampler_logp' in aux:
    metrics['mismatch'] = jnp.where(aux['weight'] > 0, jnp.abs(logp - aux['sampler_logp']), -1.0)
  return jnp.where(aux['weight'] > 0, aux['weight'] * loss, 0.0), metrics


def reduce_reports(reports_and_final) -> dict[str, float]:
  """Fetches what `update` reported and reduces it: means over scored tokens, maxima, quantiles.

  `finite` is 1.0 or 0.0; `mismatch/*` is |log pi_trainer - log pi_sampler| over the scored tokens.
  """
  reports, final = sharding.fetch(reports_and_final)
  tokens = sum(int(r['tokens']) for r in reports)
  out = {'loss': float(sum(np.float64(r['loss']) for r in reports)), 'tokens': float(tokens)}
  for name in reports[0]:
    if name in ('loss', 'tokens', 'mismatch'):
      continue
    values = [float(r[name]) for r in reports]
    out[name] = max(values) if name.endswith('_max') else sum(values) / max(tokens, 1)
  if 'mismatch' in reports[0]:
    gap = np.concatenate([r['mismatch'].reshape(-1) for r in reports])
    gap = gap[gap != -1.0] if tokens else np.zeros(1)
    out['mismatch/mean'], out['mismatch/max'] = float(gap.mean()), float(gap.max())
    out['mismatch/p99'] = float(np.quantile(gap, 0.99))
  return out | {name: float(x) for name, x in final.items()}


def save_batches(path: pathlib.Path, updates) -> None:
  """Keeps the micro-batches of a step that was not finite, for replay: one .npz of named arrays."""
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays = {}
  for u, (batches, denominators) in enumerate(updates):
    arrays[f'{u}/denominators'] = np.asarray(denominators)
    for b, batch in enumerate(batches):
      for key_path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        arrays[f'{u}/{b}/{sharding.path_of(key_path)}'] = np.asarray(leaf)
  np.savez_compressed(path, **arrays)
