"""Collecting: what is kept, how it is stored, what is learned from it; the loop around it (STaR).

A scripted sampler writes right and wrong completions, so every row of the dataset is known.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from reasonrl import (
  checkpoint,
  collecting,
  data,
  logs,
  optim,
  parameters,
  phases,
  preemption,
  records,
  rewarding,
  sampling,
  tokenizers,
  train,
  types,
)
from reasonrl.configs import common
from reasonrl.envs import single_turn
from reasonrl.records import Stop
from reasonrl.tasks import TASKS

BYTES = tokenizers.Bytes()


@pytest.fixture(scope='module')
def pool():
  with rewarding.Pool(1, 5.0) as pool:
    yield pool


# ------------------------------------------------------------------------------------ pieces


def completion(text, stop, said=None):
  ids = tuple(BYTES.encode(text if said is None else said))
  ids += (BYTES.eos_ids[0],) * (stop == Stop.EOS)
  return records.Completion(text, ids, len(ids), None, stop, 99)


def test_ids_are_the_sampled_ones_up_to_the_cut():
  eos = BYTES.eos_ids[0]
  whole = completion('ab\n12', Stop.EOS)
  assert collecting.ids_of(BYTES, whole, '', 'ab\n12') == list(whole.token_ids)
  assert collecting.ids_of(BYTES, whole, '', 'ab') == [*BYTES.encode('ab'), eos]
  cut = completion('ab\n12', Stop.LENGTH)
  assert collecting.ids_of(BYTES, cut, '', 'ab\n12') == [*cut.token_ids, eos]
  prefilled = completion('<think>ab', Stop.LENGTH, said='ab')
  assert collecting.ids_of(BYTES, prefilled, '<think>', '<think>a') == [*BYTES.encode('a'), eos]


class Pairs:
  """Two characters to a token; a single one is a token of its own."""

  eos_ids = (0,)

  def encode_user(self, text):
    return [1000 + ord(c) for c in text]

  def decode(self, ids, skip_special):
    return ''.join(chr(i - 1000) if i >= 1000 else 'xy' * (i == 1) + 'z\n' * (i == 2) for i in ids)


def test_a_token_that_the_cut_splits_is_encoded_again():
  said = records.Completion('xyz\nxy', (1, 2, 1), 3, None, Stop.LENGTH, 9)
  assert collecting.ids_of(Pairs(), said, '', 'xyz') == [1, 1000 + ord('z'), 0]
  assert collecting.ids_of(Pairs(), said, '', 'xyz\n') == [1, 2, 0]


def test_a_row_is_new_once_and_a_problem_has_so_many():
  row = lambda problem, solution: {'problem': problem, 'solution': solution}
  rows = [row('p', 'a'), row('p', 'a'), row('q', 'a'), row('p', 'b'), row('p', 'c')]
  assert collecting.Dataset([], 0).admit(rows) == [rows[i] for i in (0, 2, 3, 4)]
  assert collecting.Dataset([], 2).admit(rows) == [rows[i] for i in (0, 2, 3)]
  known = collecting.Dataset([row('p', 'a'), row('p', 'z')], 3)
  assert known.admit(rows) == [rows[2], rows[3]]
  assert known.admit(rows) == []


def test_steps_of_an_iteration():
  star = common.supervised(1e-3)
  star.update({'steps': 40, 'steps_growth': 1.2})
  expected = [40, 48, 57, 69, 82, 99, 119, 143, 171, 206, 247, 297]  # the paper's, from iteration 1
  assert [phases.steps(star, i) for i in range(12)] == expected
  assert phases.steps(star, 29) == 7912  # where the paper stops to grow
  star.update({'steps': 300, 'steps_growth': 1.0, 'steps_added': 20})
  assert [phases.steps(star, i) for i in range(3)] == [300, 320, 340]


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def stored(i, digits):
  return {
    **{'task': 't', 'split': 'train', 'index': i, 'problem': f'p{i}', 'answer': 'a'},
    **{'solution': f's{i}', 'token_ids': [i, 1], 'meta': {'digits': digits}, 'sample': 0},
  }


def test_collected_examples_take_turns(tmp_path):
  path = write(tmp_path / 'rows.jsonl', [stored(i, 1 if i < 7 else 2) for i in range(9)])
  make = lambda **changes: TASKS['collected'](
    **{'phase': 'collect', 'seed': 0, 'balance': '', 'path': path, **changes}
  )
  plain, balanced = make(), make(balance='digits')
  for epoch in (0, 5):
    indices = [plain.example('train', 9 * epoch + i).index for i in range(9)]
    assert sorted(indices) == list(range(9)) and indices != sorted(indices)
  digits = [balanced.example('train', i).meta['digits'] for i in range(28)]
  assert digits == [1, 2] * 14
  seen = [balanced.example('train', i).index for i in range(28)]
  assert sorted(seen[::2]) == sorted([*range(7)] * 2) and sorted(seen[1::2]) == [7] * 7 + [8] * 7
  example = plain.example('train', 0)
  assert example.meta == {
    'digits': 1 if example.index < 7 else 2,
    records.TOKEN_IDS: [example.index, 1],
  }
  with pytest.raises(records.UserError, match="balance='size' is not a fact of the rows"):
    make(balance='size').example('train', 0)
  with pytest.raises(records.UserError, match='collect.* has no test split'):
    plain.example('test', 0)


# ------------------------------------------------------------------------------------ the loop


@dataclasses.dataclass(frozen=True)
class Scripted(single_turn.SingleTurn):
  """Of every four problems it knows the first and third; the second it solves with the hint."""

  def rollout(self, tools, state, step):
    examples = tools.examples()

    def generate(params, requests, spec, slots):
      said = [self.said(tools, examples[p], i) for i, p in enumerate(requests.prompt_R)]
      length_R = requests.length_P[requests.prompt_R]
      shape = len(said), requests.tokens_PT.shape[1] + self.max_completion_length
      tokens, source = np.zeros(shape, np.int32), np.zeros(shape, np.int8)
      for r, ids in enumerate(said):
        tokens[r, : length_R[r]] = requests.tokens_PT[requests.prompt_R[r], : length_R[r]]
        tokens[r, length_R[r] :][: len(ids)] = ids
        source[r, length_R[r] :][: len(ids)] = types.POLICY
      ends = [ids[-1] == tools.tokenizer.eos_ids[0] for ids in said]
      stop = np.where(ends, int(Stop.EOS), int(Stop.LENGTH))
      sizes = np.asarray([len(ids) for ids in said], np.int32)
      zeros = np.zeros(shape, np.float32)
      return types.Samples(tokens, length_R, length_R + sizes, source, *[zeros] * 3, stop, None)

    return super().rollout(dataclasses.replace(tools, generate=generate), state, step)

  def said(self, tools, example, sample):
    knows = (True, records.HINT_SHOWN in example.meta, True, False)[example.index % 4]
    text = example.solution if knows else '\n</scratch>\n9 9 9 9'
    ids = tools.tokenizer.encode(text)
    # What follows the answer is not stored: the third goes on with another sum and never ends.
    more = tools.tokenizer.encode('\n\nInput:\n1 + 1')
    return [*ids, *more] if example.index % 4 == 2 else [*ids, tools.tokenizer.eos_ids[0]]


@pytest.fixture
def scripted(monkeypatch):
  monkeypatch.setitem(train.ENVS, 'scripted', Scripted)


def config(times=1, **fields):
  """A run of a few thousand parameters: pretrain, then `times` of collect and sft."""
  c = common.base('star')
  c.mesh.data = 1
  c.sampler.buckets = 1  # fewer programs to compile
  c.phases = ('pretrain', ('collect', 'sft', times))
  c.models.policy = common.model('nano')
  c.models.policy.update({'num_layers': 1, 'width': 16, 'num_heads': 2, 'num_kv_heads': 1})
  c.models.policy.update({'head_dim': 8, 'mlp_width': 16})
  c.tokenizer = common.tokenizer('sentencepiece')
  c.tokenizer.update({'model_type': 'char', 'byte_fallback': False})
  c.task = common.addition()
  c.task.max_digits = 2
  c.prompt = common.prompt('plain')
  c.prompt.add_bos = True
  c.rewards = common.rewards(addition=1.0)
  c.pretrain = common.supervised(1e-2)
  c.pretrain.update({'steps': 2, 'examples_per_step': 4, 'rows_per_batch': 2})
  c.collect = common.collect('star')
  c.collect.update({'steps': 1, 'prompts_per_step': 4})
  c.collect.env.update({'name': 'scripted', 'max_completion_length': 48, 'slots': 4})
  c.sft = common.supervised(1e-2)
  c.sft.update({'init': 'pretrain', 'steps': 2, 'examples_per_step': 4, 'rows_per_batch': 2})
  c.sft.task = common.collected('collect')
  c.evaluation = common.evaluation()
  c.evaluation.update({'num_examples': 8, 'correct': 'addition', 'by': 'digits'})
  c.evaluation.env.update({'max_completion_length': 8, 'slots': 8})
  c.log.every = c.log.transcripts_every = 1
  c.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return c


def rows_of(workdir, kind):
  return [row for row in logs.read_rows(workdir / 'metrics.jsonl') if row['kind'] == kind]


def test_the_filter_and_rationalisation(tmp_path, pool, scripted):
  """Methods text: right on {1, 3}, with the hint on {2}: D_n = {1, 3}, D_rat = {2}."""
  assert train.run(config(), str(tmp_path / 'run'), pool) == 0
  rows = logs.read_rows(tmp_path / 'run' / 'datasets' / 'collect.jsonl')
  assert [(row['index'] % 4, row['hinted'], row['prompt']) for row in rows] == [
    (0, False, 0),
    (1, True, 1),
    (2, False, 2),
  ]
  tokenizer = tokenizers.load(tmp_path / 'run' / 'tokenizer')
  task = TASKS['addition'](seed=0, min_digits=1, max_digits=2, hint='none')
  for row in rows:
    example = task.example('train', row['index'])
    assert (row['problem'], row['answer']) == (example.problem, example.answer)
    assert row['problem'].endswith('Target:') and records.HINTED not in row['meta']  # no hint
    assert row['solution'] == example.solution  # up to the answer line
    assert row['token_ids'] == [*tokenizer.encode(example.solution), *tokenizer.eos_ids]
    assert row['parts'] == {'addition': 1.0, 'addition/trace': 1.0} and row['reward'] == 1.0
    assert (row['phase'], row['iteration'], row['step'], row['sample']) == ('collect', 0, 1, 0)
  (step,) = [row for row in rows_of(tmp_path / 'run', 'train') if row['phase'] == 'collect']
  counts = {key: value for key, value in step.items() if key.startswith('collect/')}
  tokens = counts.pop('collect/sampled_tokens')
  assert counts == {
    **{'collect/problems': 4, 'collect/solved': 2, 'collect/asked': 2, 'collect/rationalized': 1},
    **{'collect/kept': 3, 'collect/samples': 6},
    **{f'collect/{which}/addition': 1.0 for which in ('plain', 'hinted')},
    **{f'collect/{which}/addition/trace': 1.0 for which in ('plain', 'hinted')},
  }
  assert tokens > sum(len(row['token_ids']) for row in rows)
  # Held-out accuracy by digits; evaluated where parameters have changed.
  evals = rows_of(tmp_path / 'run', 'eval')
  assert [row['phase'] for row in evals] == ['pretrain', 'pretrain', 'sft']
  assert {'eval/greedy/accuracy/digits=1', 'eval/sampled/accuracy/digits=2'} <= set(evals[0])
  assert 5 < evals[0]['eval/greedy/completion_length/digits=2'] <= 104
  shown = logs.read_rows(tmp_path / 'run' / 'rollouts.jsonl')
  asked = [row['prompt'] for row in shown if row['phase'] == 'collect']
  assert sum(prompt.endswith('Target:') for prompt in asked) == 4 and len(asked) == 6


@pytest.mark.parametrize(
  ('changes', 'kept'),
  [
    ({'collect__p_rationalization': 0.0}, [(0, False), (2, False)]),
    ({'collect__p_show_hint_save': 1.0}, [(0, False), (1, True), (2, False)]),
  ],
)
def test_the_probabilities_of_the_hint(tmp_path, pool, scripted, changes, kept):
  assert train.run(config(**changes), str(tmp_path / 'run'), pool) == 0
  rows = logs.read_rows(tmp_path / 'run' / 'datasets' / 'collect.jsonl')
  assert [(row['index'] % 4, row['hinted']) for row in rows] == kept
  with_hint = [not row['problem'].endswith('Target:') for row in rows]
  assert with_hint == [row['hinted'] for row in rows]  # stored with it where that was asked for


def test_rationalisation_is_drawn_for_each_problem(tmp_path, pool, scripted):
  c = config(collect__p_rationalization=0.5, collect__prompts_per_step=64)
  c.collect.p_show_hint_save = 0.5
  assert train.run(c, str(tmp_path / 'run'), pool) == 0
  (step,) = [row for row in rows_of(tmp_path / 'run', 'train') if row['phase'] == 'collect']
  assert step['collect/solved'] == 32 and 8 <= step['collect/asked'] <= 24  # of 32, sd 2.8
  assert 0 < step['collect/rationalized'] < step['collect/asked']
  rows = logs.read_rows(tmp_path / 'run' / 'datasets' / 'collect.jsonl')
  hinted = [row for row in rows if row['hinted']]
  shown = [row for row in hinted if not row['problem'].endswith('Target:')]
  assert 0 < len(shown) < len(hinted)  # whether to show and whether to store are drawn apart


def variants(self, tools, example, request):
  """Three samples of a problem: wrong, right, right by another scratchpad."""
  text = ('\n</scratch>\n9 9 9 9', example.solution, f'\n</scratch>\n{example.answer}')[request % 3]
  return [*tools.tokenizer.encode(text), tools.tokenizer.eos_ids[0]]


@pytest.mark.parametrize(('most', 'samples'), [(0, [1, 2]), (1, [1])])
def test_several_samples_of_a_problem(tmp_path, pool, scripted, monkeypatch, most, samples):
  monkeypatch.setattr(Scripted, 'said', variants)
  c = config(collect__env__num_generations=3, collect__max_per_problem=most)
  assert train.run(c, str(tmp_path / 'run'), pool) == 0
  rows = logs.read_rows(tmp_path / 'run' / 'datasets' / 'collect.jsonl')
  assert [(row['prompt'], row['sample']) for row in rows] == [
    (prompt, sample) for prompt in range(4) for sample in samples
  ]
  (step,) = [row for row in rows_of(tmp_path / 'run', 'train') if row['phase'] == 'collect']
  assert (step['collect/solved'], step['collect/asked'], step['collect/samples']) == (4, 0, 12)
  assert step['collect/plain/addition/trace'] == (0.5 if len(samples) == 2 else 1.0)


def test_a_problem_that_comes_twice_in_a_step(tmp_path, pool, scripted):
  c = config()
  c.collect.task = common.subset(c.task, 2)  # the first it solves, the second with the hint
  assert train.run(c, str(tmp_path / 'run'), pool) == 0
  rows = logs.read_rows(tmp_path / 'run' / 'datasets' / 'collect.jsonl')
  assert [(row['index'], row['prompt'], row['hinted']) for row in rows] == [
    (0, 0, False),
    (1, 1, True),
  ]
  (step,) = [row for row in rows_of(tmp_path / 'run', 'train') if row['phase'] == 'collect']
  assert (step['collect/solved'], step['collect/asked']) == (2, 2)


def test_the_two_passes_draw_apart(tmp_path, pool, scripted, monkeypatch):
  purposes, real = [], sampling.row_keys

  def row_keys(seed, purpose, *place):
    purposes.append(purpose)
    return real(seed, purpose, *place)

  monkeypatch.setattr(sampling, 'row_keys', row_keys)
  assert train.run(config(), str(tmp_path / 'run'), pool) == 0
  assert [purpose for purpose in purposes if purpose != 'eval'] == ['collect', 'hint']


def test_an_augmentation_is_applied_once(tmp_path, pool, scripted, monkeypatch):
  asked, learned = [], []
  said, sequence = Scripted.said, data.supervised_sequence

  def watch(self, tools, example, sample):
    asked.append(example.problem)
    return said(self, tools, example, sample)

  def learn(tokenizer, prompt, prefill, example, row_length):
    learned.extend([example.problem] if records.TOKEN_IDS in example.meta else [])
    return sequence(tokenizer, prompt, prefill, example, row_length)

  monkeypatch.setattr(Scripted, 'said', watch)
  monkeypatch.setattr(data, 'supervised_sequence', learn)
  c = config(tokenizer__byte_fallback=True)
  c.prompt.augmentations = common.augmentations('suffix')
  c.prompt.augmentations.suffix.text = ' Go:'
  c.prompt.max_length, c.sft.row_length = 72, 128
  assert train.run(c, str(tmp_path / 'run'), pool) == 0
  assert len(asked) == 6 and all(problem.count(' Go:') == 1 for problem in asked)
  assert sum('Target: Go:' in problem for problem in asked) == 4  # without a hint
  assert learned and all(problem.endswith('Target: Go:') for problem in learned)


def test_it_can_be_evaluated(tmp_path, pool, scripted):
  run, again = tmp_path / 'run', tmp_path / 'again'
  assert train.run(config(times=2), str(run), pool) == 0
  command = [sys.executable, '-m', 'reasonrl.evaluate', f'--workdir={run}', f'--to={again}']
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  assert 'accuracy/digits=1' in done.stdout
  (row,), last = rows_of(again, 'eval'), rows_of(run, 'eval')[-1]
  assert last['phase'] == 'sft' and last['iteration'] == 1
  assert row['eval/greedy/outcomes'] == last['eval/greedy/outcomes']


def test_every_iteration_starts_from_the_base_and_samples_with_the_last(
  tmp_path, pool, scripted, monkeypatch
):
  begun, real = [], parameters.init

  def init(setup, order, index, workdir, model, source):
    folder = parameters.folder_of(setup, order, index, workdir, model, source)
    begun.append((order[index], folder and folder.name))
    return real(setup, order, index, workdir, model, source)

  monkeypatch.setattr(parameters, 'init', init)
  schedules, build = set(), optim.build
  monkeypatch.setattr(optim, 'build', lambda c, p, n: schedules.add(n) or build(c, p, n))
  c = config(times=3, sft__steps=2, sft__steps_added=1)
  assert train.run(c, str(tmp_path / 'run'), pool) == 0
  assert begun == [
    (('pretrain', 0), None),
    *((('collect', 0), 'pretrain'), (('sft', 0), 'pretrain')),
    *((('collect', 1), 'sft-0'), (('sft', 1), 'pretrain')),
    *((('collect', 2), 'sft-1'), (('sft', 2), 'pretrain')),
  ]
  steps = [row for row in rows_of(tmp_path / 'run', 'train') if row['phase'] == 'sft']
  assert [(row['iteration'], row['phase_step']) for row in steps] == [
    *((0, 1), (0, 2)),
    *((1, 1), (1, 2), (1, 3)),
    *((2, 1), (2, 2), (2, 3), (2, 4)),
  ]
  assert [row['step'] for row in steps] == [4, 5, 7, 8, 9, 11, 12, 13, 14]
  assert schedules == {2, 3, 4}  # the schedule begins anew and ends with the phase
  folders = {path.name for path in (tmp_path / 'run' / 'phases').iterdir()}
  assert folders >= {'collect-2', 'sft-0', 'sft-1', 'sft-2'}
  assert train.run(c, str(tmp_path / 'run'), pool) == 0  # a finished run is left alone


def leaves(folder):
  return jax.tree.leaves(checkpoint.load_params(folder, None))


def test_where_nothing_was_kept_the_parameters_stay(tmp_path, pool, scripted, monkeypatch, capsys):
  monkeypatch.setattr(Scripted, 'said', lambda self, tools, example, sample: [5, 6, 7])
  assert train.run(config(times=2), str(tmp_path / 'run'), pool) == 0
  assert (tmp_path / 'run' / 'datasets' / 'collect-1.jsonl').read_text() == ''
  base, *others = (leaves(tmp_path / 'run' / 'phases' / n) for n in ('pretrain', 'sft-0', 'sft-1'))
  for other in others:
    for a, b in zip(base, other, strict=True):
      np.testing.assert_array_equal(a, b)
  assert 'sft has nothing to learn: collect kept nothing' in capsys.readouterr().out
  assert not [row for row in rows_of(tmp_path / 'run', 'train') if row['phase'] == 'sft']


def short_sums():
  task = common.addition()
  task.max_digits = 2
  return task


PAUSED = {
  **{'times': 2, 'collect__steps': 3, 'collect__p_rationalization': 0.6},
  'checkpoint__save_every': 2,
  # the third step has the problems of the first again: what it solves by itself is not new
  'collect__task': common.subset(short_sums(), 8),
}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, pool):
  whole = tmp_path_factory.mktemp('undisturbed') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(train.ENVS, 'scripted', Scripted)
    assert train.run(config(**PAUSED), str(whole), pool) == 0
  return whole


@pytest.mark.parametrize('stop_after', (6, 13, 19, 27))
def test_stopped_anywhere_it_goes_on_exactly(
  tmp_path, pool, scripted, monkeypatch, undisturbed, stop_after
):
  """Stopped at the n-th time that it looks; and soon after that killed without a save."""
  looked, real = [0], preemption.StopSignal.poll

  def poll(self):
    looked[0] += 1
    if looked[0] == stop_after:
      raise preemption.Stopped(143)
    if looked[0] == stop_after + 3:
      raise KeyboardInterrupt
    real(self)

  monkeypatch.setattr(preemption.StopSignal, 'poll', poll)
  stopped = tmp_path / 'run'
  assert train.run(config(**PAUSED), str(stopped), pool) == 143
  with pytest.raises(KeyboardInterrupt):
    train.run(config(**PAUSED), str(stopped), pool)
  assert train.run(config(**PAUSED), str(stopped), pool) == 0
  for name in ('datasets/collect-0.jsonl', 'datasets/collect-1.jsonl', 'rollouts.jsonl'):
    assert (stopped / name).read_bytes() == (undisturbed / name).read_bytes(), name
  rows = logs.read_rows(stopped / 'datasets' / 'collect-0.jsonl')
  assert {row['step'] for row in rows if not row['hinted']} == {1, 2}
  for a, b in zip(*(leaves(w / 'phases' / 'sft-1') for w in (undisturbed, stopped)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_worked_examples_stand_before_what_is_sampled_and_not_in_what_is_learned(
  tmp_path, pool, scripted, monkeypatch
):
  asked, learned, said = [], [], Scripted.said

  def watch(self, tools, example, sample):
    asked.append((example, tools.tokenizer.decode(tools.render(example), skip_special=True)))
    return said(self, tools, example, sample)

  def sequence(tokenizer, prompt, prefill, example, row_length):
    if records.TOKEN_IDS in example.meta:
      learned.append((tokenizer.decode(prompt, skip_special=True), example.problem))
    return real(tokenizer, prompt, prefill, example, row_length)

  real = data.supervised_sequence
  monkeypatch.setattr(Scripted, 'said', watch)
  monkeypatch.setattr(data, 'supervised_sequence', sequence)
  shots = {'prompt__few_shot': 'task', 'prompt__few_shot_count': 2, 'prompt__max_length': 144}
  c = config(**shots, sft__row_length=208)
  c.models.policy.max_position = 512
  assert train.run(c, str(tmp_path / 'run'), pool) == 0
  task = TASKS['addition'](seed=0, min_digits=1, max_digits=2, hint='none')
  for example, text in asked:
    first, second = task.worked(example, 2)
    if records.HINT_SHOWN in example.meta:
      first, second = records.show_hint(first), records.show_hint(second)
    solved = [shot.problem + shot.solution for shot in (first, second)]
    assert text == f'{solved[0]}\n\n{solved[1]}\n\n{example.problem}'
  assert len(asked) == 6 and learned
  assert all(text == problem for text, problem in learned)


def test_accuracy_by_a_fact_that_examples_do_not_have(tmp_path, pool, scripted):
  with pytest.raises(
    records.UserError, match=r"evaluation.by='size' is not a name or number .* checked_by"
  ):
    train.run(config(evaluation__by='size'), str(tmp_path / 'run'), pool)


def test_where_nothing_more_was_kept_the_last_parameters_stay(
  tmp_path, pool, scripted, monkeypatch
):
  said, rollout, collects = Scripted.said, Scripted.rollout, []

  def count(self, tools, state, step):
    collects.append(step)
    return rollout(self, tools, state, step)

  def once(self, tools, example, sample):
    return said(self, tools, example, sample) if len(collects) <= 2 else [5, 6, 7]

  monkeypatch.setattr(Scripted, 'rollout', count)
  monkeypatch.setattr(Scripted, 'said', once)
  assert train.run(config(times=2), str(tmp_path / 'run'), pool) == 0
  base, first, second = (
    leaves(tmp_path / 'run' / 'phases' / n) for n in ('pretrain', 'sft-0', 'sft-1')
  )
  assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
  assert not all(np.array_equal(a, b) for a, b in zip(base, first, strict=True))


def test_a_dataset_that_changed_while_the_run_was_stopped(tmp_path, pool, scripted, monkeypatch):
  real = preemption.StopSignal.poll

  def poll(self):
    if (tmp_path / 'run' / 'datasets' / 'collect.jsonl').exists() and not stopped:
      if any(row['phase'] == 'sft' for row in rows_of(tmp_path / 'run', 'train')):
        stopped.append(True)
        raise preemption.Stopped(143)
    real(self)

  stopped = []
  monkeypatch.setattr(preemption.StopSignal, 'poll', poll)
  c = config(sft__steps=6)
  assert train.run(c, str(tmp_path / 'run'), pool) == 143
  path = tmp_path / 'run' / 'datasets' / 'collect.jsonl'
  path.write_text(path.read_text().replace('addition', 'subtract'))
  with pytest.raises(records.UserError, match='datasets has changed since the run stopped in sft'):
    train.run(c, str(tmp_path / 'run'), pool)


def shown():
  task = common.addition()
  task.hint = 'shown'
  return task


def misspelt():
  task = common.collected('collect')
  task.balance = 'digit'
  return task


@pytest.mark.parametrize(
  ('field', 'value', 'says'),
  [
    ('sft__steps_growth', float('nan'), 'sft.steps_growth=nan must be positive'),
    ('sft__steps_growth', -1.2, 'sft.steps_growth=-1.2 must be positive'),
    ('collect__task', shown(), 'collect.p_rationalization=1.0, but problems of addition show'),
    ('sft__task', misspelt(), "balance='digit' is not a name or number that problems of collect"),
    ('prompt__few_shot_count', 3, "prompt: few_shot_count=3 needs few_shot='task' or a file"),
    ('collect__p_rationalization', 1.5, r'collect.p_rationalization=1.5 must be in \[0, 1\]'),
    (
      'sft__row_length',
      64,
      'sft.row_length=64 is shorter than the 113 tokens that a row of collect.env may have',
    ),
    ('phases', ('pretrain', 'sft'), "sft.task reads phase='collect', which is not an earlier"),
    ('collect__max_per_problem', -1, 'collect.max_per_problem=-1 must be at least 0'),
    ('task', common.collected('collect'), 'task: what collect collects is for the task of a phase'),
    ('sft__init', 'collect', "sft.init='collect' is not 'previous', 'scratch', an earlier phase"),
  ],
)
def test_bad_input_stops_at_start(tmp_path, pool, scripted, field, value, says):
  with pytest.raises(records.UserError, match=says):
    train.run(config(**{field: value}), str(tmp_path / 'run'), pool)
  assert not (tmp_path / 'run').exists()
