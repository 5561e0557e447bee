"""RLP as a whole run: sampler and trainer agree on what a thought was drawn from, the average is in
the checkpoint, texts are learned beside thoughts, no program holds the logits of a text."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_policy_loss
import tiny

from reasonrl import (
  checkpoint,
  controls,
  learner,
  packing,
  records,
  rewarding,
  sampling,
  sharding,
  train,
  types,
)
from reasonrl.configs import common, rlp

SHUT, START, EOS = 1, 2, 0


@pytest.fixture(scope='module')
def pool():
  with rewarding.Pool(2, 5.0) as pool:
    yield pool


def short(**fields):
  """Two steps of RLP on a random model."""
  config = rlp.get_config('debug').unlock()
  config.mesh.data = 1
  config.sampler.buckets = 1  # fewer programs to compile
  config.phases = ('rlp',)
  config.models.policy.update(num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8)
  config.models.policy.mlp_width = 16
  config.rlp.steps = 2
  config.rlp.prompts_per_step = 8
  config.rlp.rows_per_batch = 4
  config.rlp.eval_every = 0
  config.rlp.env.num_generations = 4
  config.evaluation.num_examples = 8
  config.evaluation.env.num_generations = 2
  for field, value in fields.items():
    *parents, last = field.split('__')
    section = config
    for name in parents:
      section = section[name]
    section[last] = value
  return config.lock()


def rows_of(workdir, kind='train'):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]
  return [row for row in rows if row['kind'] == kind]


def leaves(path):
  return jax.tree.leaves(checkpoint.load_params(path, None))


def test_sampler_and_trainer_agree_on_thoughts(tmp_path, pool):
  """At temperature .7, with tokens that a thought cannot have; the ratio is 1, the loss 0."""
  config = short(rlp__env__temperature=0.7, rlp__env__min_thought=3)
  assert train.run(config, str(tmp_path / 'run'), pool) == 0
  for row in rows_of(tmp_path / 'run'):
    assert row['mismatch/max'] < 1e-4 and row['ratio_gap_max'] == 0 and abs(row['loss']) < 1e-5
    assert 'sentinels' not in row and row['grad_norm'] > 1e-4
    assert row['unmasked_tokens'] == 0 and row['think_length'] >= 3
    assert row['reward'] == pytest.approx(
      row['reward/information_gain/think'] - row['reward/information_gain/no_think'], abs=1e-5
    )
    assert row['token_forwards/total'] == pytest.approx(row['token_forwards/formula'], rel=0.2)
  # Before the first update the average is the policy: without a thought both say the same.
  (last,) = [row for row in rows_of(tmp_path / 'run', 'eval') if row['phase_step'] == 2]
  assert 'eval/sampled/reward/information_gain/class=syntax' in last
  shown = [json.loads(line) for line in (tmp_path / 'run' / 'rollouts.jsonl').open()]
  thought = next(row for row in shown if row['kind'] == 'train')
  assert re.fullmatch(r'<think>.{3,}</think>', thought['completion'], re.DOTALL)


def test_several_updates_on_the_same_thoughts(tmp_path, pool):
  """Old log-probabilities are those of the pass that scored the thoughts; gains stay fixed."""
  config = short(rlp__algorithm__num_iterations=2, rlp__optim__learning_rate=0.01, rlp__steps=1)
  assert train.run(config, str(tmp_path / 'run'), pool) == 0
  (row,) = rows_of(tmp_path / 'run')
  assert row['ratio_gap_max'] < 1e-4 < abs(row['ratio_max'] - 1)  # of the first update; of all


def test_the_average_survives_a_kill(tmp_path, pool):
  """The end is the same bit for bit: parameters and average, wherever the run was cut."""
  changes = {'rlp__steps': 4, 'checkpoint__save_every': 1, 'rlp__optim__learning_rate': 0.01}
  changes |= {'rlp__algorithm__baseline': 'batch_mean', 'rlp__optim__ema_decay': 0.5}
  assert train.run(short(**changes), str(tmp_path / 'whole'), pool) == 0
  cut = short(**(changes | {'rlp__steps': 2}))
  assert train.run(cut, str(tmp_path / 'cut'), pool) == 0
  shutil.rmtree(tmp_path / 'cut' / 'phases')  # as if it had been killed there
  saved = json.loads((tmp_path / 'cut' / 'config.json').read_text())
  saved['rlp']['steps'] = 4
  (tmp_path / 'cut' / 'config.json').write_text(json.dumps(saved))
  assert train.run(short(**changes), str(tmp_path / 'cut'), pool) == 0
  for name in ('rlp', 'rlp-ema'):
    whole, again = (leaves(tmp_path / run / 'phases' / name) for run in ('whole', 'cut'))
    for a, b in zip(whole, again, strict=True):
      np.testing.assert_array_equal(a, b)
  ema, params = (leaves(tmp_path / 'whole' / 'phases' / name) for name in ('rlp-ema', 'rlp'))
  assert any((a != b).any() for a, b in zip(ema, params, strict=True))


def test_what_the_average_is_made_of_changes_nothing(tmp_path, pool):
  """Its score is that of a context: leave-one-out subtracts it, the mean of the batch does not."""
  ends = {}
  for baseline in ('leave_one_out', 'batch_mean'):
    for tau in (0.0, 0.9):
      changes = {'rlp__algorithm__baseline': baseline, 'rlp__optim__ema_decay': tau}
      config = short(rlp__steps=3, rlp__optim__learning_rate=0.01, rlp__optim__eps=1e-3, **changes)
      run = tmp_path / f'{baseline}-{tau}'
      assert train.run(config, str(run), pool) == 0
      ends[baseline, tau] = np.concatenate([x.reshape(-1) for x in leaves(run / 'phases' / 'rlp')])
  gap = lambda baseline: np.abs(ends[baseline, 0.0] - ends[baseline, 0.9]).max()
  assert gap('leave_one_out') < 1e-5 < 1e-4 < gap('batch_mean')


@pytest.mark.parametrize(
  'changes',
  [
    {'rlp__env__thoughts': 'other'},
    {
      **{'rlp__env__no_think': 'empty_think', 'rlp__env__positions_per_text': 2},
      **{'rlp__env__horizon': 3, 'rlp__algorithm__zero_variance': 'drop'},
    },
    {
      **{'rlp__env__no_think': 'ref', 'rlp__optim__ema_decay': None},
      **{'rlp__env__position_sampler': 'topq_entropy'},
    },
    {
      **{'rlp__env__position_sampler': 'every_k', 'rlp__env__every': 12},
      **{'rlp__env__top_k': 5, 'rlp__env__train_close': False},
    },
    {'rlp__ntp_coef': 0.3, 'rlp__algorithm__num_minibatches': 2},
  ],
  ids=str,
)
def test_one_step_of_every_way(tmp_path, pool, changes):
  assert train.run(short(rlp__steps=1, **changes), str(tmp_path / 'run'), pool) == 0
  (row,) = rows_of(tmp_path / 'run')
  assert row['finite'] == 1 and 'sentinels' not in row and row['mismatch/max'] < 1e-4
  assert ('loss/text_weight' in row) == ('rlp__ntp_coef' in changes)
  if 'rlp__ntp_coef' in changes:  # .3 of the loss of a text that is not known yet: log 43
    assert row['loss/text_weight'] == pytest.approx(0.3 * np.log(43), rel=0.1)


def test_predictions_that_are_said(tmp_path, pool):
  config = short(rlp__env__predicts=2, rlp__steps=1).unlock()
  config.rewards = common.rewards(token_match=1.0, prefix_match=1.0)
  assert train.run(config.lock(), str(tmp_path / 'run'), pool) == 0
  (row,) = rows_of(tmp_path / 'run')
  assert row['mismatch/max'] < 1e-4 and 'token_forwards/score' not in row
  assert 0 <= row['reward/prefix_match'] <= 0.5 and 0 <= row['reward/token_match'] <= 0.5


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'rlp__optim__ema_decay': None}, "no_think='ema' needs rlp.optim.ema_decay"),
    ({'rlp__row_length': 40}, 'rlp.row_length=40 is shorter than the'),
    ({'rlp__env__max_context': 400}, 'more than the 256 positions'),
    ({'evaluation__env__no_think': 'ema'}, 'evaluation.env.no_think'),
    ({'evaluation__env__position_sampler': 'all'}, "must be 'uniform' or 'class', and 1"),
    ({'rlp__env__predicts': 1}, 'rewards=information_gain do not apply'),
    ({'task': common.arithmetic()}, "reads texts; task 'arithmetic' has problems"),
  ],
)
def test_what_cannot_run_is_refused(tmp_path, pool, changes, message):
  with pytest.raises(records.UserError, match=message):
    train.run(short(**changes), str(tmp_path / 'run'), pool)


# ------------------------------------------------------------------------------------ its parts

MODEL = tiny.model(vocab_size=8, max_position=64)
SAMPLER = sampling.Sampler(MODEL, sharding.make_mesh(1, 1, 1), (), **common.sampler())


def sampled(control, params, rows=64, new=8):
  requests = types.Requests(
    tokens_PT=np.array([[5, 6, START]], np.int32),
    length_P=np.array([3], np.int32),
    prompt_R=np.zeros(rows, np.int32),
    key_R=sampling.row_keys(0, 'train', 0, 0, 0, 0, np.arange(rows), 0),
    max_new_R=np.full(rows, new, np.int32),
    numbers={},
    temperature_R=None,
  )
  spec = types.Spec(0.8, 0, 1.0, 0.0, 0, (EOS,), (control,))
  return SAMPLER.generate(params, requests, spec, 0, lambda: None)


@pytest.mark.parametrize('close, least', [((SHUT,), 1), ((SHUT,), 3), ((SHUT, 3), 1)])
def test_a_thought_ends_with_its_tag_and_not_before_it_has_begun(close, least):
  """And its log-probabilities are those of a trainer that knows what was barred."""
  params = jax.tree.map(lambda x: 2.0 * x, MODEL.init(jax.random.key(1)))
  control = controls.Thought(tuple((i,) for i in close), close, least, (EOS, START))
  out = sampled(control, params)
  ended = 0
  for r in range(64):
    said = out.tokens_RS[r, 3 : out.length_R[r]].tolist()
    assert not {EOS, START} & set(said) and SHUT not in said[:least]
    at = next((i for i in range(len(said)) if tuple(said[i : i + len(close)]) == close), None)
    if at is None:
      assert len(said) == 8 and out.stop_R[r] == records.Stop.LENGTH
    else:
      ended += 1
      assert at >= least and at + len(close) == len(said) and out.stop_R[r] == records.Stop.EOS
  assert 2 < ended < 64
  # The trainer, with and without what was barred.
  mask = (out.source_RS == types.POLICY).astype(np.float32)
  barred = np.full((*mask.shape, 3), -1, np.int32)
  for r in range(64):
    barred[r, 3 : out.length_R[r]] = control.barred(8)[: out.length_R[r] - 3]
  form = SAMPLER.form(0.8)
  student = tiny.make_learner(MODEL, params)
  student = dataclasses.replace(student, form=form)
  gaps = []
  for aux in ({'weight': mask, 'barred': barred}, {'weight': mask}):
    seqs = packing.sequences(out.tokens_RS, out.length_R, aux)
    batches, where = packing.pack(seqs, 32, 8, share=True)
    logps = [np.asarray(student.score(params, batch).logp) for batch in batches]
    gaps.append(np.abs(packing.unpack(logps, seqs, where, mask.shape) - out.logp_RS).max())
  assert gaps[0] < 1e-5 and gaps[1] > 0.05


def test_texts_beside_rollouts_are_a_sum_of_two_losses():
  """ntp_coef times the mean loss of the texts' tokens, whatever the rollouts' temperature is."""
  grpo = tiny.algorithm('rlp')
  found = tiny.experience([1.0, 0.0], [0, 0], [3, 2], vocab=8)
  weight_BT, denominator = grpo.weights(found)
  barred = np.where(found.mask_BT[..., None] > 0, EOS, -1).astype(np.int32)
  barred[found.tokens_BT == EOS] = -1
  aux = {'weight': weight_BT, 'adv': grpo.advantages(found), 'barred': barred}
  seqs = packing.sequences(found.tokens_BT, found.length_B, aux)
  text = types.Sequence(np.array([5, 6, 7, 3], np.int32), np.arange(1, 4), {'weight': np.ones(3)})
  params = MODEL.init(jax.random.key(2))
  first = learner.Term(grpo.token_loss, None, 'weight')
  second = learner.Term(learner.nll, None, 'text_weight')
  make = lambda *terms: dataclasses.replace(
    tiny.make_learner(MODEL, params, *terms), form=SAMPLER.form(0.5)
  )

  def gradient(student, seqs, denominators):
    batches, _ = packing.pack(seqs, 8, 2, share=True)
    grads, loss, reports = student.gradients(params, batches, denominators)
    return float(loss), jax.device_get(grads), jax.device_get(reports)

  both = packing.with_texts(seqs, [text, text], 0.3)
  loss, grads, reports = gradient(make(first, second), both, (denominator, 6.0))
  alone, its, _ = gradient(make(first), seqs, (denominator,))
  plain = make(learner.Term(learner.nll, None, 'weight'))
  plain = dataclasses.replace(plain, form=SAMPLER.form(1.0))
  row = text._replace(aux={'weight': np.ones(3, np.float32)})
  read, theirs, _ = gradient(plain, [row, row], (6.0,))
  assert loss == pytest.approx(alone + 0.3 * read, rel=1e-5)
  assert sum(float(r['loss/text_weight']) for r in reports) == pytest.approx(0.3 * read, rel=1e-5)
  assert sum(int(r['tokens']) for r in reports) == found.mask_BT.sum()  # of the thoughts alone
  for got, a, b in zip(*map(jax.tree.leaves, (grads, its, theirs)), strict=True):
    np.testing.assert_allclose(got, a + 0.3 * b, atol=1e-6)


@pytest.mark.parametrize('vocab, rows', [(1280, 48), (2560, 24)])
def test_no_program_holds_the_logits_of_a_text(vocab, rows):
  """Update with both losses, scoring, and the sampler: nothing is as large as [B, T, V]."""
  T, model = 8, tiny.model(vocab_size=vocab)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  terms = [learner.Term(tiny.algorithm('rlp').token_loss, None, 'weight')]
  terms.append(learner.Term(learner.nll, None, 'text_weight'))
  student = tiny.make_learner(model, shapes, *terms)
  ints, floats = jnp.ones((rows, T), jnp.int32), jnp.ones((rows, T))
  names = ('weight', 'adv', 'sampler_logp', 'text_weight', 'plain')
  aux = {**dict.fromkeys(names, floats), 'barred': jnp.ones((rows, T, 3), jnp.int32)}
  batch = types.Batch(*[ints] * 6, aux)
  sizes = rows * T, model.width, vocab, student.loss_chunk
  update = learner.Learner.accumulate.lower(student, shapes, shapes, batch, (jnp.float32(1.0),) * 2)
  test_policy_loss.check_memory(update.compile(), *sizes)
  test_policy_loss.check_memory(
    learner.Learner.score.lower(student, shapes, batch).compile(), *sizes, scores=True
  )
  sampler = sampling.Sampler(model, sharding.make_mesh(1, 1, 1), (), **common.sampler())
  spec = types.Spec(
    1.0, 0, 1.0, 0.0, 0, (EOS,), (controls.Thought(((SHUT,),), (SHUT,), 1, (EOS, START)),)
  )
  prefill = lambda params: sampler.prefill(params, ints, jnp.full(rows, T), 2 * T)
  state = jax.eval_shape(prefill, shapes)
  for program in (
    jax.jit(prefill).lower(shapes),
    sampling.Sampler.decode.lower(sampler, shapes, state, spec, T),
  ):
    largest = max(test_policy_loss.arrays(program.compile()).values())
    assert largest <= max(rows * vocab, vocab * model.width) < rows * T * vocab
