"""A planted NaN is found where it was planted; a dump is read back as it was written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_learner
import tiny

from reasonrl import learner, packing, postmortem, records

PARAMS, STUDENT = test_learner.PARAMS, test_learner.STUDENT
LENGTHS = (9, 9, 8, 9, 7, 9)  # three micro-batches, each row one sequence


class Letters:
  def id_to_piece(self, i):
    return 'abcdefghijk'[i]


def find(batches, student=STUDENT, params=PARAMS, denominators=(20.0,)):
  return postmortem.find(student, params, batches, denominators, Letters())


def planted(name, value, token=(1, 1, 2)):
  """Micro-batches of two rows in which one scored token has another aux value."""
  batches = test_learner.packed(test_learner.rows(LENGTHS), row_length=12, per_batch=2)
  b, row, slot = token
  aux = {n: x.copy() for n, x in batches[b].aux.items()}
  assert aux['weight'][row, slot] > 0
  aux[name][row, slot] = value
  batches[b] = dataclasses.replace(batches[b], aux=aux)
  return batches


def test_a_healthy_update_is_finite():
  report = find(planted('adv', 0.5))
  assert report.finite and report.origin is None
  assert [row['bad_tokens'] for row in report.micro_batches] == [0] * len(report.micro_batches)
  total, _, _ = test_learner.gradient(STUDENT, planted('adv', 0.5), 20.0)
  assert sum(row['loss'] for row in report.micro_batches) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
  'name, value, quantity, term, detail',
  [
    ('adv', np.nan, 'adv', '', 'is nan'),
    ('adv', -np.inf, 'adv', '', 'is -inf'),
    ('weight', np.inf, 'weight', '', 'is inf'),
    ('ref_logp', np.nan, 'ref_logp', '', 'is nan'),
    ('ref_logp', 1e3, 'kl', 'GRPO.token_loss', 'is inf'),  # finite, until it is exponentiated
    ('adv', -1e37, 'gradient', '', 'has a norm that overflows'),  # finite, until it is squared
  ],
)
def test_a_planted_token_is_named(name, value, quantity, term, detail):
  batches = planted(name, value)
  report = find(batches)
  origin, token = report.origin, report.origin.token
  assert not report.finite
  assert (origin.quantity, origin.term) == (quantity, term) and detail in origin.detail
  assert (token.micro_batch, token.row, token.slot) == (1, 1, 2)
  assert token.token_id == batches[1].tokens_BT[1, batches[1].index_BM[1, 2]]
  assert token.text == 'abcdefghijk'[token.token_id]
  assert token.values[name] == pytest.approx(value, nan_ok=True)
  bad = [not np.isfinite(row['grad_norm']) for row in report.micro_batches]
  assert bad == [False, True, *[False] * (len(batches) - 2)]
  assert f'({token.text!r}): micro-batch 1, row 1, slot 2' in str(origin)


def test_a_value_of_a_masked_token_is_not_blamed():
  batches = planted('adv', np.nan)
  masked = batches[0].aux['weight'] == 0
  aux = batches[0].aux | {'adv': np.where(masked, np.float32(np.nan), batches[0].aux['adv'])}
  batches[0] = dataclasses.replace(batches[0], aux=aux)
  assert masked.any() and find(batches).origin.token.micro_batch == 1


def test_a_parameter_is_named_and_the_first_token_that_it_reached():
  leaves, tree = jax.tree.flatten(PARAMS)
  paths = [learner.sharding.path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]
  at = next(i for i, path in enumerate(paths) if 'down' in path)
  leaves[at] = leaves[at].at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
  origin = find(planted('adv', 0.5), params=jax.tree.unflatten(tree, leaves)).origin
  assert (origin.quantity, origin.token.micro_batch, origin.token.row) == ('parameter', 0, 0)
  assert origin.detail == f'{paths[at]} has 2 entries that are not finite'
  assert np.isnan(origin.token.values['logp'])


@pytest.mark.parametrize('bad', [np.nan, 0.0])
def test_a_denominator_is_named(bad):
  report = find(planted('adv', 0.5), denominators=(bad,))
  assert str(report.origin).startswith(f'denominator of GRPO.token_loss is {bad:g}')


def test_the_term_of_several_is_named():
  """The second of two, whose slope at log-probabilities below 0 is 0 / 0."""

  def root(out, aux):
    return jnp.sqrt(jnp.maximum(out.logp, 0.0)), {}

  student = dataclasses.replace(STUDENT, terms=(*STUDENT.terms, learner.Term(root, None, 'weight')))
  report = find(planted('adv', 0.5), student, denominators=(20.0, 3.0))
  assert report.origin.quantity == 'dloss/dlogp' and report.origin.term.endswith('root')
  assert np.isfinite(report.micro_batches[0]['loss'])


def test_what_overflows_only_together_names_no_token():
  """Three times the same micro-batch, whose gradient norm is just below the root of the largest
  float32, 1.8e19."""
  batch = planted('adv', 0.5)[0]

  def loud(factor):
    aux = batch.aux | {'adv': batch.aux['adv'] * np.float32(factor)}
    return dataclasses.replace(batch, aux=aux)

  student = dataclasses.replace(
    STUDENT, terms=(learner.Term(tiny.algorithm().token_loss, None, 'weight'),)
  )
  one = find([loud(1e10)], student).micro_batches[0]['grad_norm']
  report = find([loud(1e10 * 1e19 / one)] * 3, student)
  assert [row['grad_norm'] for row in report.micro_batches] == pytest.approx([1e19] * 3, rel=1e-3)
  assert (report.origin.quantity, report.origin.token) == ('gradient', None)
  assert str(report.origin) == 'gradient overflows, though that of every micro-batch is finite'


def test_first_bad_by_hand_and_everywhere():
  assert postmortem.first_bad(lambda items: 7 in items, list(range(9))) == 7
  assert postmortem.first_bad(lambda items: sum(items) > 9, [5, 5]) is None
  assert postmortem.first_bad(lambda items: True, [5, 5]) is None  # whatever the items
  for n in range(1, 18):
    for where in range(n):
      items = np.arange(n)
      assert postmortem.first_bad(lambda part, where=where: where in part, items) == where


# ------------------------------------------------------------------------------------ files


def write(dumps, name, params, skipped, batches):
  place = {'phase': 'rl', 'step': 3, 'update': 0}
  return dumps.write(name, place, (STUDENT, Letters()), params, (batches, (20.0,)), skipped)


def test_a_dump_is_read_back(tmp_path):
  batches = planted('adv', np.nan)
  said = write(postmortem.Dumps(tmp_path), 'rl-3-0', PARAMS, 1, batches)
  assert said.startswith('adv is nan') and said.endswith(f'--replay={tmp_path}/rl-3-0.npz')
  place, again, denominators, params = postmortem.read(tmp_path / 'rl-3-0.npz')
  assert (place['phase'], place['step'], denominators) == ('rl', 3, (20.0,))
  assert place['report'] == json.loads((tmp_path / 'rl-3-0.json').read_text())['report']
  assert place['report']['origin']['token']['slot'] == 2
  for ours, theirs in zip(batches, again, strict=True):
    test_learner.assert_trees_equal(ours, theirs)
  assert jax.tree.structure(batches) == jax.tree.structure(again)
  test_learner.assert_trees_equal(postmortem.checkpoint.load_params(params, PARAMS), PARAMS)


def test_a_dump_in_which_nothing_is_shared_and_an_old_one_are_read_back(tmp_path):
  """None is no array; dumps from before `before_BM` shared nothing."""
  seqs = packing.sequences(*test_learner.rows(LENGTHS))
  batches, _ = packing.pack(seqs, 12, 2, share=False)
  write(postmortem.Dumps(tmp_path), 'rl-3-0', PARAMS, 1, batches)
  path = tmp_path / 'rl-3-0.npz'
  with np.load(path) as saved:
    arrays = {name: saved[name] for name in saved.files if not name.endswith('/before_BM')}
  for rewrite in (False, True):
    if rewrite:
      np.savez(path, **arrays)
    _, again, _, _ = postmortem.read(path)
    for ours, theirs in zip(batches, again, strict=True):
      assert theirs.prefixes_BT is None
      test_learner.assert_trees_equal(ours, theirs)


def test_parameters_are_kept_once_for_updates_in_a_row_and_three_times_in_all(tmp_path):
  dumps, batches = postmortem.Dumps(tmp_path), planted('adv', np.nan)
  for number, skipped in enumerate((1, 2, 1, 1, 1, 2)):
    write(dumps, f'rl-{number}-0', PARAMS, skipped, batches)
  kept = sorted(path.name for path in tmp_path.glob('*.params'))
  assert kept == ['rl-0-0.params', 'rl-2-0.params', 'rl-3-0.params']
  assert postmortem.read(tmp_path / 'rl-1-0.npz')[3].name == 'rl-0-0.params'
  for late in (4, 5):
    with pytest.raises(records.UserError, match='its parameters were not kept'):
      postmortem.read(tmp_path / f'rl-{late}-0.npz')
  # A run that was resumed among skipped updates has nothing to refer to.
  write(postmortem.Dumps(tmp_path / 'other'), 'rl-7-0', PARAMS, 3, batches)
  assert postmortem.read(tmp_path / 'other' / 'rl-7-0.npz')[3].name == 'rl-7-0.params'


@pytest.mark.parametrize('name', ['none.npz', 'config.json'])
def test_what_is_no_dump_is_refused(tmp_path, name):
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(records.UserError, match='is not a dump'):
    postmortem.read(tmp_path / name)
