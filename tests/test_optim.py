"""Schedules by hand, AdamW against a float64 oracle, rules by (regex, value)."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny

from reasonrl import optim, records

PARAMS = {
  'embed': {'weight': jnp.array([[0.5, -1.0], [2.0, 0.1]])},
  'norm': {'scale': jnp.array([1.0, 0.9])},
  'o': {'weight': jnp.array([[1.5, -0.2]])},
}
GRADS = {
  'embed': {'weight': jnp.array([[3.0, 0.0], [-1.0, 0.5]])},
  'norm': {'scale': jnp.array([0.2, -0.4])},
  'o': {'weight': jnp.array([[1.0, 1.0]])},
}


def run(cfg, grads=GRADS, steps=2, total=4):
  tx = optim.build(cfg, PARAMS, total)
  params, state = PARAMS, tx.init(PARAMS)
  for _ in range(steps):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def flat(tree):
  return {'/'.join(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# ------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
  'name, warmup, want',
  [
    ('constant', 0, [1, 1, 1, 1, 1, 1, 1]),
    ('constant', 2, [0.5, 1, 1, 1, 1, 1, 1]),
    # 4 steps after 2 of warmup: 1 - (1 - .2) * done, done = 0, 1/4, ...
    ('linear', 2, [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
    # 1 - .8 * (1 - cos(pi done)) / 2
    ('cosine', 2, [0.5, 1, 1, 0.882843, 0.6, 0.317157, 0.2]),
    ('linear', 0, [1, 0.866667, 0.733333, 0.6, 0.466667, 0.333333, 0.2]),
  ],
)
def test_schedule_by_hand(name, warmup, want):
  cfg = tiny.optimizer(learning_rate=3e-4, schedule=name, warmup_steps=warmup, final_fraction=0.2)
  got = [float(optim.schedule(cfg, 6)(step)) for step in range(7)]
  np.testing.assert_allclose(got, 3e-4 * np.array(want), rtol=1e-5)


@pytest.mark.parametrize('name', optim.SCHEDULES)
@pytest.mark.parametrize('warmup', [0, 1, 5])
@pytest.mark.parametrize('steps', [1, 3, 7])
def test_learning_rate_is_positive_from_the_first_step_on(name, warmup, steps):
  cfg = tiny.optimizer(schedule=name, warmup_steps=warmup, final_fraction=0.0)
  assert all(float(optim.schedule(cfg, steps)(step)) > 0 for step in range(steps))


def test_unknown_schedule_lists_the_choices():
  with pytest.raises(records.UserError, match="optim.schedule='step' is not one of .*cosine"):
    optim.schedule(tiny.optimizer(schedule='step'), 3)


def test_the_chain_follows_the_schedule():
  """At step t Adam under a constant gradient moves by lr(t), whatever the gradient's size."""
  cfg = tiny.optimizer(
    learning_rate=0.1, schedule='linear', warmup_steps=2, final_fraction=0.0, eps=0.0
  )
  params = [run(cfg, steps=n)[0]['o']['weight'] for n in range(5)]
  moves = [float((a - b)[0, 0]) for a, b in itertools.pairwise(params)]
  np.testing.assert_allclose(moves, [0.05, 0.1, 0.1, 0.05], rtol=1e-4)


# ------------------------------------------------------------------------------------ AdamW


@pytest.mark.parametrize('max_norm', [1.0, 100.0])
def test_adamw_with_decay_by_regex_equals_the_oracle(max_norm):
  cfg = tiny.optimizer(
    learning_rate=0.1,
    schedule='cosine',
    weight_decay=((r'scale', 0.0), (r'embed', 0.3), (r'.*', 0.1)),
    max_grad_norm=max_norm,
    eps=1e-3,
  )
  got, _ = run(cfg, steps=3, total=4)
  want = oracle.adamw(
    flat(PARAMS),
    flat(GRADS),
    3,
    learning_rate=lambda t: 0.1 * (1 - 0.9 * (1 - np.cos(np.pi * t / 4)) / 2),
    b1=cfg.b1,
    b2=cfg.b2,
    eps=cfg.eps,
    decay={'embed/weight': 0.3, 'norm/scale': 0.0, 'o/weight': 0.1},
    max_norm=max_norm,
  )
  for name, x in flat(got).items():
    np.testing.assert_allclose(x, want[name], rtol=2e-5)


def test_first_matching_rule_wins():
  still = jax.tree.map(jnp.zeros_like, GRADS)
  cfg = tiny.optimizer(learning_rate=1.0, weight_decay=((r'weight', 0.5), (r'embed', 0.0), ('', 0)))
  got, _ = run(cfg, grads=still, steps=1)
  np.testing.assert_allclose(got['embed']['weight'], 0.5 * PARAMS['embed']['weight'])
  np.testing.assert_array_equal(got['norm']['scale'], PARAMS['norm']['scale'])


def test_lr_scale_multiplies_step_and_decay():
  cfg = functools.partial(tiny.optimizer, weight_decay=((r'.*', 0.1),))
  whole, _ = run(cfg(), steps=1)
  half, _ = run(cfg(lr_scale=((r'embed', 0.5), (r'.*', 1.0))), steps=1)
  move = lambda tree, name: flat(tree)[name] - flat(PARAMS)[name]
  for name, factor in (('embed/weight', 0.5), ('o/weight', 1.0)):
    np.testing.assert_allclose(move(half, name), factor * move(whole, name), atol=1e-7)


# ------------------------------------------------------------------------------------ freezing


def test_frozen_parameters_do_not_move_have_no_moments_and_do_not_count_in_the_norm():
  cfg = tiny.optimizer(
    lr_scale=((r'embed', 0), (r'.*', 1)), weight_decay=((r'.*', 0.1),), max_grad_norm=1.0
  )
  got, state = run(cfg, steps=2)
  np.testing.assert_array_equal(got['embed']['weight'], PARAMS['embed']['weight'])
  moments = [x.shape for x in jax.tree.leaves(state) if x.ndim]
  assert sorted(moments) == [(1, 2), (1, 2), (2,), (2,)]
  # A large frozen gradient must not shrink the others' steps (eps makes the step see its size).
  loud = {**GRADS, 'embed': {'weight': 1e3 * GRADS['embed']['weight']}}
  sees = functools.partial(run, tiny.optimizer(lr_scale=((r'embed', 0), ('', 1)), eps=1.0))
  np.testing.assert_array_equal(sees(loud)[0]['o']['weight'], sees(GRADS)[0]['o']['weight'])
  assert (got['o']['weight'] != PARAMS['o']['weight']).all()


@pytest.mark.parametrize('field', ['weight_decay', 'lr_scale'])
def test_an_uncovered_parameter_is_an_error(field):
  cfg = tiny.optimizer(**{field: ((r'embed', 1.0), (r'scale', 1.0))})
  with pytest.raises(records.UserError, match=rf"optim\.{field}: parameter 'o/weight'.*embed"):
    optim.build(cfg, PARAMS, 3)
