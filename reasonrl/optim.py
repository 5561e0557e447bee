"""AdamW with schedules and clipping; decay and freezing by (regex, value).

`weight_decay` and `lr_scale` are lists of (regex, value) over parameter paths; the first match wins
and a parameter that no regex covers is an error. lr_scale 0 freezes: such a parameter has no
optimizer moments and does not count in the norm that is clipped (the logged one has it).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from reasonrl import records, sharding

SCHEDULES = ('constant', 'linear', 'cosine')


@dataclasses.dataclass(frozen=True)
class Optim:
  """AdamW (arXiv 1711.05101) and its schedule; every default is in `configs/common.py`."""

  learning_rate: float
  schedule: str
  warmup_steps: int
  final_fraction: float  # of learning_rate, where 'linear' and 'cosine' end: after the last step
  b1: float
  b2: float
  eps: float
  weight_decay: tuple
  lr_scale: tuple
  max_grad_norm: float
  ema_decay: float | None


def schedule(cfg: Optim, steps: int):
  """Learning rate at step 0, 1, ...: linear warmup that starts above zero, then the named curve.

  Raises:
    UserError: an unknown schedule.
  """
  if cfg.schedule not in SCHEDULES:
    raise records.UserError(f'optim.schedule={cfg.schedule!r} is not one of {SCHEDULES}')

  def at(step):
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    done = jnp.clip((step - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1), 0.0, 1.0)
    fall = {
      'constant': 0.0,
      'linear': done,
      'cosine': 0.5 * (1.0 - jnp.cos(jnp.pi * done)),
    }[cfg.schedule]
    return cfg.learning_rate * warm * (1.0 - (1.0 - cfg.final_fraction) * fall)

  return at


def build(cfg: Optim, params, steps: int) -> optax.GradientTransformation:
  """The optax chain for this parameter tree (arrays or shapes): clip, Adam, decay, rate."""

  def by_path(rules, what):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: float(sharding.match(sharding.path_of(path), rules, what)), params
    )

  decay = by_path(cfg.weight_decay, 'optim.weight_decay')
  scale = by_path(cfg.lr_scale, 'optim.lr_scale')
  train = optax.chain(
    optax.clip_by_global_norm(cfg.max_grad_norm),
    optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
    _per_leaf(lambda u, p, d: u + d * p.astype(u.dtype), decay),
    _per_leaf(lambda u, p, s: s * u, scale),
    optax.scale_by_learning_rate(schedule(cfg, steps)),
  )
  labels = jax.tree.map(lambda s: 'train' if s else 'freeze', scale)
  return optax.multi_transform({'train': train, 'freeze': optax.set_to_zero()}, labels)


def frozen() -> optax.GradientTransformation:
  """Never changes a parameter: for phases that only read them."""
  return optax.set_to_zero()


def _per_leaf(fn, values) -> optax.GradientTransformation:
  """update -> fn(update, param, value of that leaf); leaves masked out by multi_transform pass."""
  masked = lambda x: isinstance(x, optax.MaskedNode)

  def update(updates, state, params):
    apply = lambda u, p, v: u if masked(u) else fn(u, p, v)
    return jax.tree.map(apply, updates, params, values, is_leaf=masked), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
