"""The algorithm-blind learner: packs rows, accumulates gradients over micro-batches, applies them.

1. `sequences` cuts padding off, `pack` puts sequences side by side into micro-batches of one shape.
2. `Learner.accumulate` adds one micro-batch's gradients to a donated sum.
3. `Learner.apply` clips and updates; if the loss or a gradient is not finite, the step is skipped.
4. `Learner.score` is the forward-only path: log-probability and entropy of given tokens.
5. `reduce_reports` turns what the device reported into metrics, on the host, one step later.

The loss is a list of terms, each a sum over scored tokens of weight x token loss, divided by a
denominator computed once for the whole optimizer step and passed in: micro-batching, packing and
sharding cannot change it. All terms share one pass of the head.
"""

from __future__ import annotations

import dataclasses
import functools
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


class Scored(NamedTuple):
  """What `Learner.score` says of scored tokens, float32 [B, M]: see `types.Scores`."""

  logp: jax.Array
  entropy: jax.Array
  likeliest: jax.Array


# Aux arrays that say what a token was drawn from: see kernels.policy_loss.
SUPPORT = ('kept', 'barred', 'plain')


@dataclasses.dataclass(frozen=True)
class Term:
  """One summand of the loss.

  token_loss: (out, aux) -> (loss_M, {metric: [M]}), elementwise, without weights.
  prepare: None, or (logp_BM, batch) -> {name: [B, M]}, more aux arrays for sequence-level
    quantities, at the price of a scoring pass; compiled together with it.
  weight: the aux array of its weights: 'weight', or another where it has tokens of its own.
  """

  token_loss: Callable
  prepare: Callable | None
  weight: str


def nll(out: Out, aux) -> tuple[jax.Array, dict]:
  """-log p of the scored token: pretraining, SFT and rejection-sampled data."""
  del aux
  return -out.logp, {}


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
  loss_backend: str  # of ops.BACKENDS
  loss_chunk: int  # scored tokens of a device whose logits exist at a time; 0: see ops.ROWS

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
    return self._constrain(types.TrainState(params, self.tx.init(params), ema, zero))

  def update(self, state: types.TrainState, batches: list[types.Batch], denominators):
    """One optimizer step over host micro-batches.

    Args:
      state: donated.
      batches: from `pack`, at least one.
      denominators: one float per term: the global ones of this optimizer step.

    Returns:
      the new state, and reports (device values; see `reduce_reports`).
    """
    grads, loss, reports = self.gradients(state.params, batches, denominators)
    state, final = self.apply(state, grads, loss)
    return state, (reports, final)

  def gradients(self, params, batches: list[types.Batch], denominators):
    """The first half of `update`: gradients, loss, and the reports of the micro-batches."""
    replicated = sharding.replicated(self.mesh)
    denominators = jax.device_put(tuple(np.float32(d) for d in denominators), replicated)
    reports = []
    with jax.transfer_guard('disallow'):  # whatever crosses to the device is put there on purpose
      grads = self._zeros(params)
      for batch in batches:
        batch = self.put(params, batch)
        grads, report = self.accumulate(params, grads, batch, denominators)
        reports.append(report)
      # Summed here: a list would compile `apply` anew for every number of micro-batches.
      loss = functools.reduce(jnp.add, [report['loss'] for report in reports])
    return grads, loss, reports

  def put(self, params, batch: types.Batch) -> types.Batch:
    """A host micro-batch on the device, with what the terms prepare."""
    batch = sharding.put_rows(batch, self.mesh)
    for term in self.terms:
      if term.prepare is not None:
        batch = self._prepared(term.prepare, params, batch)
    return batch

  @functools.partial(jax.jit, static_argnums=0)
  def _zeros(self, params):
    return self._constrain(jax.tree.map(jnp.zeros_like, params))

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def accumulate(self, params, grads, batch: types.Batch, denominators):
    """grads + the gradient of this micro-batch's share of the loss; and its report."""

    hidden_MD, pull = jax.vjp(lambda params: self._hidden(params, batch), params)
    targets_M, support, aux = self._targets(batch)
    aux['shares'] = tuple(jnp.full(targets_M.shape, 1.0 / d) for d in denominators)
    head_VD = self.model.head(params)
    (loss, metrics), (dhidden_MD, dhead_VD) = ops.policy_loss_and_grads(
      hidden_MD,
      head_VD,
      ops.forbid(self.model.vocab_size, self.forbidden),
      targets_M,
      support,
      aux,
      functools.partial(total, self.terms),
      self._spec(support, head_VD.shape[1]),
      self.mesh,
      self.model.head(grads),
    )
    (new,) = pull(dhidden_MD)
    grads = jax.tree.map(jnp.add, self.model.with_head(grads, dhead_VD), new)
    report = {'loss': loss, 'tokens': jnp.sum(aux['weight'] > 0), **metrics}
    mask_M = batch.aux['weight'].reshape(-1) > 0
    for name, value in report.items():
      if value.ndim and name != 'mismatch':  # [M] -> what the metric is: a maximum, or a sum
        if not name.startswith('loss/'):
          value = jnp.where(mask_M, value, 0.0)
        report[name] = value.max() if name.endswith('_max') else value.sum()
    return self._constrain(grads), report

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def apply(self, state: types.TrainState, grads, loss):
    """Updates the state, or leaves it as it is if the loss or the gradient norm is not finite."""
    grad_norm = global_norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      d = self.ema_decay
      ema = jax.tree.map(lambda e, p: d * e + (1.0 - d) * p, ema, params)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    new = types.TrainState(
      params=keep(params, state.params),
      opt_state=keep(opt_state, state.opt_state),
      ema=keep(ema, state.ema),
      skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    report = {'grad_norm': grad_norm, 'finite': finite, 'skipped': new.skipped}
    if new.ema is not None:
      report['ema_distance'] = global_norm(jax.tree.map(jnp.subtract, new.params, new.ema))
    return self._constrain(new), report

  @functools.partial(jax.jit, static_argnums=0)
  def score(self, params, batch: types.Batch) -> Scored:
    """Log-probability, entropy and rank of the scored tokens, [B, M] each; forward only."""
    targets_M, support, _ = self._targets(batch)
    head_VD = self.model.head(params)
    out = ops.token_logps(
      self._hidden(params, batch),
      head_VD,
      ops.forbid(self.model.vocab_size, self.forbidden),
      targets_M,
      support,
      self._spec(support, head_VD.shape[1]),
      self.mesh,
    )
    flat = (out.logp, out.entropy, out.likeliest)
    return Scored(*(x.reshape(batch.index_BM.shape) for x in flat))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def _prepared(self, prepare, params, batch: types.Batch) -> types.Batch:
    """The batch with the aux arrays that `prepare` makes of a scoring pass, as one program."""
    more = prepare(self.score(params, batch).logp, batch)
    return dataclasses.replace(batch, aux={**batch.aux, **more})

  def _hidden(self, params, batch):
    """The hidden state before each scored token, [M, D]."""
    hidden_BTD, _ = self.model.hidden(
      params,
      batch.tokens_BT,
      batch.positions_BT,
      batch.segments_BT,
      prefixes_BT=batch.prefixes_BT,
      mesh=self.mesh,
    )
    hidden_BMD = jnp.take_along_axis(hidden_BTD, batch.before_BM[:, :, None], axis=1)
    return hidden_BMD.reshape(-1, hidden_BMD.shape[-1])

  def _targets(self, batch):
    """The scored tokens, their support, aux: flat, [M, ...]."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    targets_BM = jnp.take_along_axis(batch.tokens_BT, batch.index_BM, axis=1)
    aux = jax.tree.map(flat, batch.aux)
    support = {name: aux.pop(name) for name in SUPPORT if name in aux}
    return flat(targets_BM), support, aux

  def _spec(self, support, width: int):
    asked = (self.loss_backend, self.loss_chunk, self.form)
    return ops.loss_spec(*asked, support, width, self.mesh)

  def _constrain(self, tree):
    rules = self.model.sharding_rules
    return jax.lax.with_sharding_constraint(tree, sharding.param_shardings(tree, rules, self.mesh))


def global_norm(tree) -> jax.Array:
  """The norm of all leaves together, float32."""
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares))


def total(terms, logp, entropy, aux):
  """The sum of all terms, each weighted; metrics of the first, and what each other term adds.

  aux['shares']: for every term 1 / its denominator, an array like all others.
  """
  loss, metrics = 0.0, {}
  for n, (term, share) in enumerate(zip(terms, aux['shares'], strict=True)):
    part, said = weighted(term.token_loss, logp, entropy, aux | {'weight': aux[term.weight]})
    part = share * part
    loss = loss + part
    metrics |= {f'loss/{term.weight}': part} if n else said
  return loss, metrics


def weighted(token_loss, logp, entropy, aux):
  """Weight x token loss, exactly 0 where the weight is 0; and the metrics every term reports."""
  loss, metrics = token_loss(Out(logp, entropy), aux)
  metrics = {**metrics, 'entropy': entropy}
  if 'ratio_max' in metrics:  # before it is reduced: the ratio of each token
    gap = jnp.abs(metrics['ratio_max'] - 1.0)
    metrics |= {'ratio_gap': gap, 'ratio_gap_max': gap}
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
    if name.startswith('loss/'):  # the share of a term
      out[name] = sum(values)
      continue
    out[name] = max(values) if name.endswith('_max') else sum(values) / max(tokens, 1)
  if 'mismatch' in reports[0]:
    gap = np.concatenate([r['mismatch'].reshape(-1) for r in reports])
    gap = gap[gap != -1.0] if tokens else np.zeros(1)
    out['mismatch/mean'], out['mismatch/max'] = float(gap.mean()), float(gap.max())
    out['mismatch/p99'] = float(np.quantile(gap, 0.99))
  return out | {name: float(x) for name, x in final.items()}


def merge_reports(reports: list[dict]) -> dict:
  """One row from the reports of a step's updates: means, maxima; mismatch, KL, gap of the first.

  Only the first update meets the parameters that sampled.
  """
  out = {}
  for name in reports[0]:
    values = [report[name] for report in reports]
    if name.startswith(('mismatch', 'ratio_gap')) or name == 'kl':
      out[name] = values[0]
    elif name == 'tokens':
      out[name] = sum(values)
    elif name == 'finite':
      out[name] = min(values)
    elif name.endswith('_max') or name == 'skipped':
      out[name] = max(values)
    else:
      out[name] = sum(values) / len(values)
  return out
