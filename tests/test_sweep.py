"""The sweep launcher: what its trials are called with, and what it does when they end.

The trials are real processes of the real `main`, in a clone whose `train` only writes one metric
and leaves with the exit code that the config asks for.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from reasonrl import records
from reasonrl.experiments import sweep

ROOT = pathlib.Path(__file__).parent.parent
R1_ZERO = str(ROOT / 'configs' / 'r1_zero.py')


# ------------------------------------------------------------------------------------ trials


def trial(**overrides) -> sweep.Trial:
  return sweep.make_trial('', R1_ZERO, {}, overrides)


@pytest.mark.parametrize(
  'field, value, typed',
  [
    ('seed', 3, 3),
    ('rl.optim.learning_rate', 1, 1.0),
    ('rl.optim.learning_rate', 1e-07, 1e-07),
    ('prompt.add_bos', False, False),
    ('prompt.system', 'a=b, "c" \n--d', 'a=b, "c" \n--d'),
    ('phases', ('pretrain', ('rl', 2)), ('pretrain', ('rl', 2))),
    ('task.strides', [0, 1], (0, 1)),
    ('task.strides', (), ()),
    ('rl.optim.weight_decay', ((r'scale|bias', 0.0), (r'.*', 0.1)), None),
    ('rl.algorithm.epsilon_high', None, None),
    ('rl.algorithm.epsilon_high', 0.28, 0.28),
  ],
)
def test_value_arrives_typed(field, value, typed):
  typed = value if field == 'rl.optim.weight_decay' else typed
  found = trial(**{field: value}).overrides[field]
  assert found == typed and type(found) is type(typed)


@pytest.mark.parametrize(
  'field, value, said',
  [
    ('rl.stepz', 1, "no config field 'rl.stepz', did you mean 'steps'"),
    ('seed', 2.5, 'config.seed=2.5'),
    ('seed', True, 'config.seed=True'),
    ('tokenizer.path', 3, "tokenizer.path: 3 would arrive as '3'"),
    ('rl.algorithm.epsilon', None, 'rl.algorithm.epsilon: None would arrive as 0.2'),
    ('rl.env', 1, 'config.rl.env=1'),
  ],
)
def test_value_that_would_not_arrive(field, value, said):
  with pytest.raises((records.UserError, flags.Error), match=said.replace('.', r'\.')):
    trial(**{field: value})


def test_folder_names():
  one, two = trial(seed=1), trial(seed=2)
  assert one.name == f'seed=1_{one.key}' and two.name == f'seed=2_{two.key}' and one.key != two.key
  assert trial(seed=1) == one  # the same in another process: the next test's skipping relies on it
  assert trial(**{'prompt.system': '../a b'}).name.startswith('system=..-a-b_')
  debug = sweep.make_trial('', f'{R1_ZERO}:debug', {}, {'seed': 1})
  common = sweep.make_trial('', R1_ZERO, {'rl.steps': 3}, {'seed': 1})
  assert len({one.key, debug.key, common.key}) == 3
  assert common.name == f'seed=1_{common.key}'
  assert common.overrides == {'rl.steps': 3, 'seed': 1}
  assert sweep.make_trial('lr+1', R1_ZERO, {'seed': 1}, {'seed': 2}).overrides == {'seed': 2}
  for name in ('a/b', '..', '-x', 'a b'):
    with pytest.raises(records.UserError, match='no folder name'):
      sweep.make_trial(name, R1_ZERO, {}, {})


def test_list_names_the_bad_trial():
  def bad(add):
    add(seed=1)
    add(name='second', sede=1)

  def twice(add):
    add(seed=1)
    add(seed=1)

  with pytest.raises(records.UserError, match=r"trial 1 \(second\): no config field 'sede'"):
    sweep.list_trials(bad, R1_ZERO, {})
  with pytest.raises(records.UserError, match='trial 1: seed=1_.* was added before'):
    sweep.list_trials(twice, R1_ZERO, {})
  with pytest.raises(records.UserError, match='no trial'):
    sweep.list_trials(lambda add: None, R1_ZERO, {})


@pytest.mark.parametrize('path', sorted(ROOT.glob('experiments/*/sweep.py')), ids=str)
def test_every_sweep_of_the_repository_is_good(path):
  function = sweep.runpy.run_path(str(path))['sweep']
  assert sweep.list_trials(function, R1_ZERO, {})


def test_chips():
  # The shapes are those of JAX's own multi-process tests: two chips lie along the second axis.
  assert sweep.pin(1, 2) == {
    'TPU_VISIBLE_CHIPS': '2,3',
    'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,2,1',
    'TPU_PROCESS_BOUNDS': '1,1,1',
    'TPU_PROCESS_ADDRESSES': 'localhost:8477',
    'TPU_PROCESS_PORT': '8477',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }


# ------------------------------------------------------------------------------------ launcher

STUBS = {
  'jax.py': 'def process_index(): return 0\n',
  'reasonrl/report.py': 'def write(workdir): pass\n',
  'reasonrl/rewarding.py': 'import contextlib\ndef Pool(*_): return contextlib.nullcontext()\n',
  'configs/toy.py': """
import ml_collections
def get_config(arg=''):
  return ml_collections.ConfigDict({
    'seed': 0, 'name': arg, 'do': 'finish', 'x': 0.0, 'rewarding': {'workers': 1, 'timeout_s': 1.0}
  })
""",
  # 'wait' ends only when asked to, and finishes when started again; 'save' takes its time
  'reasonrl/train.py': """
import json, os, pathlib, signal, sys, time
from reasonrl import records
def run(config, workdir, pool, flag):
  path = pathlib.Path(workdir)
  again = path.is_dir()
  path.mkdir(exist_ok=True)
  print(f'seed {config.seed}, chip {os.environ.get("TPU_VISIBLE_CHIPS")}')
  if config.do == 'refuse':
    raise records.UserError('this trial is bad; choices: others')
  if config.do == 'die':
    os.kill(os.getpid(), signal.SIGKILL)
  if config.do == 'crash' or (config.do == 'crash once' and not again):
    raise RuntimeError('broken')
  if config.do in ('wait', 'save') and not again:
    saves = lambda *_: (path / 'saves').open('a').write('x')
    signal.signal(signal.SIGTERM, saves if config.do == 'save' else lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    (path / 'waits').write_text(str(os.getpid()))
    time.sleep(60)
    raise RuntimeError('never asked to leave')
  accuracy = 1 - (config.x - 0.3) ** 2
  rows = [
    {'step': 0, 'kind': 'eval', 'eval/sampled/accuracy': 0.0},
    {'step': 1, 'kind': 'eval', 'eval/sampled/accuracy': accuracy, 'eval/greedy/accuracy': 0.5,
     'eval/sampled/reward': 2.0},
    {'step': 1, 'kind': 'train'},
  ]
  text = chr(10).join(map(json.dumps, rows)) + chr(10) + '{"half a li'
  (path / 'metrics.jsonl').write_text(text)
  return 0
""",
}


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp('clone')
  for name in ('reasonrl', 'kernels', 'configs', 'experiments'):
    shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name, source in STUBS.items():
    (root / name).write_text(source)
  return root


class Launcher:
  """`launch(sweep file, flags)` in an empty folder; what it said and left."""

  def __init__(self, clone, cwd):
    self.clone, self.cwd, self.to = clone, cwd, cwd / 'to'
    # The working directory comes first: a test may put a module there.
    self.environment = os.environ | {'PYTHONPATH': f'{cwd}:{clone}'}

  def start(self, text: str, *flags_: str) -> subprocess.Popen:
    (self.cwd / 'sweep.py').write_text(text)
    program = [sys.executable, str(self.clone / 'experiments' / 'sweep.py')]
    given = ['--config=configs/toy.py', '--sweep=sweep.py', '--to=to', *flags_]
    return subprocess.Popen(
      [*program, *given],
      cwd=self.cwd,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
      # Tests that a shell runs in the background ignore Ctrl-C, and so would their children.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

  def __call__(self, text: str, *flags_: str) -> tuple[int, str, str]:
    process = self.start(text, *flags_)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def index(self) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in (self.to / 'sweep.jsonl').read_text().splitlines()]
    return [(row['trial'], row['exit_code']) for row in rows]


@pytest.fixture
def launch(clone, tmp_path) -> Launcher:
  return Launcher(clone, tmp_path)


ONE_OF_EACH = """
def sweep(add):
  add(name='good', seed=1, x=0.3)
  add(name='bad', do='crash', seed=2)
  add(name='dead', do='die')
  add(name='flaky', do='crash once', seed=3, config='configs/toy.py:other')
"""


def test_finishes_retries_and_skips(launch):
  given = ('--config.rewarding.workers=2', '--metric=eval/sampled/reward')
  code, out, err = launch(ONE_OF_EACH, *given, '--max_parallel=2', '--chips_per_trial=1')
  assert code == 1, err
  assert sorted(launch.index()) == [
    *[('bad', 1), ('bad', 1), ('dead', 137), ('dead', 137), ('flaky', 0), ('flaky', 1)],
    ('good', 0),
  ]
  assert re.search(r'\nbad: exit code 1 after \d+ s, RuntimeError: broken\n', out)
  assert 'seed 1, chip 0\n' in (launch.to / 'good.log').read_text()
  assert 'seed 2, chip 1\n' in (launch.to / 'bad.log').read_text()
  rows = {row['trial']: row for row in json.loads((launch.to / 'summary.json').read_text())}
  good = rows['good']
  assert good['overrides'] == {'rewarding.workers': 2, 'seed': 1, 'x': 0.3}
  assert good['eval/sampled/accuracy'] == 1.0 and good['eval/greedy/accuracy'] == 0.5
  assert good['eval/sampled/think_length'] is None and good['step'] == 1
  assert rows['bad']['eval/sampled/accuracy'] is None
  assert rows['flaky']['config'] == 'configs/toy.py:other'
  table = [line.split('│')[1:-1] for line in out.splitlines() if line.startswith('│ good')]
  name, config, *cells = [cell.strip() for cell in table[0]]
  # do, seed, x, metrics, exit code; what all have in common is not shown
  assert cells == ['', '1', '0.3', '1.000', '0.500', '', '2.000', '0']

  # Started again: what finished is not, unless it changed or its folder is gone.
  shutil.rmtree(launch.to / 'flaky')
  changed = ONE_OF_EACH.replace("do='crash',", '').replace("do='die'", '').replace('0.3', '0.4')
  code, out, err = launch(changed, '--retries=0', *given)
  assert code == 1, err  # flaky is new, so it crashes again
  assert launch.index()[7:] == [('good', 0), ('bad', 0), ('dead', 0), ('flaky', 1)]
  code, out, err = launch(changed, *given)
  assert launch.index()[11:] == [('flaky', 0)] and code == 0
  assert 'good: finished before' in out


def test_bad_input_stops_everything(launch):
  code, out, err = launch('def sweep(add):\n  add(seed=1)\n  add(seed=2, sede=1)\n')
  assert code == 2 and launch.index() == []
  assert err.startswith("error: trial 1: no config field 'sede', did you mean 'seed'?")
  text = """
def sweep(add):
  add(name='long', do='wait')
  add(name='bad', do='refuse')
  add(name='never')
"""
  code, out, err = launch(text, '--max_parallel=2')
  assert code == 2 and sorted(name for name, _ in launch.index()) == ['bad', 'long']
  assert re.search(r'\nbad: exit code 2 after \d+ s, this trial is bad; choices: others\n', out)


WAITING = """
def sweep(add):
  for seed in range(3):
    add(name=f'{seed}', seed=seed, do='wait')
"""


def wait_for(*paths: pathlib.Path) -> None:
  end = time.monotonic() + 60
  while not all(path.exists() for path in paths):
    assert time.monotonic() < end
    time.sleep(0.02)


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_reaches_the_trials_and_the_sweep_goes_on(launch, number, code):
  process = launch.start(WAITING, '--max_parallel=2')
  wait_for(launch.to / '0' / 'waits', launch.to / '1' / 'waits')
  os.killpg(process.pid, number)  # as a terminal does: to the launcher, and not to its trials
  out, err = process.communicate(timeout=60)
  assert process.returncode == code, err
  assert sorted(launch.index()) == [('0', 143), ('1', 143)]
  assert launch(WAITING.replace('range(3)', 'range(2)'))[0] == 0
  assert launch.index()[2:] == [('0', 0), ('1', 0)]


def test_second_signal_does_not_wait_for_the_save(launch):
  process = launch.start("def sweep(add):\n  add(name='slow', do='save')\n")
  wait_for(launch.to / 'slow' / 'waits')
  process.terminate()
  wait_for(launch.to / 'slow' / 'saves')
  time.sleep(0.3)  # in which it must not be told again
  process.terminate()
  process.communicate(timeout=60)
  assert process.returncode == 143 and launch.index() == [('slow', 130)]
  assert (launch.to / 'slow' / 'saves').read_text() == 'x'


def test_one_sweep_at_a_time_in_a_folder(launch):
  process = launch.start(WAITING)
  wait_for(launch.to / '0' / 'waits')
  for _ in range(2):  # while it runs, and while a trial outlives it
    code, out, err = launch(WAITING)
    assert code == 2 and 'still runs there' in err
    process.kill()
    process.communicate()
  os.kill(int((launch.to / '0' / 'waits').read_text()), signal.SIGTERM)
  code, err = 2, 'still runs there'
  while 'still runs there' in err:
    code, out, err = launch(WAITING.replace('range(3)', 'range(1)'))
  assert code == 0 and launch.index() == [('0', 0)]


def test_dry_run_prints_commands_that_work(launch):
  text = "def sweep(add):\n  add(name='a', seed=5, do='finish')\n"
  code, out, err = launch(text, '--config.x=0.5', '--dry_run')
  assert code == 0 and not launch.to.exists(), err
  command = out.splitlines()[-1]
  assert command.endswith('toy.py --workdir=to/a --config.x=0.5 --config.seed=5 --config.do=finish')
  launch.to.mkdir()
  subprocess.run(command, shell=True, cwd=launch.cwd, env=launch.environment, check=True)
  assert (launch.to / 'a' / 'metrics.jsonl').exists()


@pytest.mark.parametrize(
  'text, given, said',
  [
    ('', (), 'either sweep(add) or search(trial)'),
    ('def sweep(add): pass\ndef search(trial): pass', (), 'either sweep(add) or search(trial)'),
    ('', ('--sweep=none.py',), "no file 'none.py'"),
    ('', ('--workdir=x',), 'no --workdir'),
    ('', ('--to=',), 'give --to=FOLDER'),
    ('', ('--config.sede=1',), "'sede'"),
    ('', ('--chips_per_trial=3',), '1|2|4'),
    ('', ('more',), "what is 'more'?"),
  ],
)
def test_bad_flags_are_one_line(launch, text, given, said):
  code, out, err = launch(text, *given)
  assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and said in err


SEARCH = """
def search(trial):
  return {'x': trial.suggest_float('x', 0, 1), 'do': WHAT.get(trial.number, 'finish')}
"""


def open_study(launch):
  optuna = pytest.importorskip('optuna')
  log = optuna.storages.journal.JournalFileBackend(str(launch.to / 'optuna.log'))
  storage = optuna.storages.JournalStorage(log)
  return optuna.load_study(storage=storage, study_name='eval/sampled/accuracy')


def test_search_goes_on_from_what_it_knows(launch):
  pytest.importorskip('optuna')
  text = 'WHAT = {}' + SEARCH
  code, out, err = launch(text, '--trials=4', '--max_parallel=2')
  assert code == 0, err
  assert sorted(launch.index()) == [(f'{i:04}', 0) for i in range(4)]
  study = open_study(launch)
  for trial in study.trials:
    assert trial.value == pytest.approx(1 - (trial.params['x'] - 0.3) ** 2)
  assert study.best_value == max(trial.value for trial in study.trials)
  # A trial that was under way when the machine died is drawn again, and so is its folder.
  lost = study.ask()
  lost.set_user_attr('name', 'lost')
  value = lost.suggest_float('x', 0, 1)
  code, out, err = launch(text, '--trials=6')
  assert [name for name, _ in launch.index()[4:]] == ['lost', '0006']
  assert study.trials[5].params['x'] == value and len(study.trials) == 7
  assert len({trial.params['x'] for trial in study.trials}) == 6  # drawn once, but for the lost one
  # One whose run had finished is only asked how it went.
  study.enqueue_trial(study.trials[0].params, user_attrs={'name': '0000'})
  launch(text, '--trials=7')
  assert len(launch.index()) == 6 and study.trials[7].value == study.trials[0].value


def test_search_outlives_a_crash_and_a_signal(launch):
  pytest.importorskip('optuna')
  text = "WHAT = {0: 'crash', 1: 'wait'}" + SEARCH
  process = launch.start(text, '--trials=2', '--retries=0')
  wait_for(launch.to / '0001' / 'waits')
  process.terminate()
  out, err = process.communicate(timeout=60)
  assert process.returncode == 143 and launch.index() == [('0000', 1), ('0001', 143)]
  assert launch(text.replace('1:', '2:'), '--trials=1')[0] == 0
  assert launch.index()[2:] == [('0001', 0)]
  states = [trial.state.name for trial in open_study(launch).trials]
  assert states == ['FAIL', 'FAIL', 'COMPLETE']


def test_search_without_the_metric_leaves_no_trial_behind(launch):
  pytest.importorskip('optuna')
  text = "WHAT = {1: 'wait'}" + SEARCH
  for _ in range(2):  # the second is not refused: no trial holds the lock
    code, out, err = launch(text, '--metric=eval/acuracy', '--max_parallel=2')
    assert code == 2
    assert re.fullmatch(
      r"error: 000\d has no 'eval/acuracy'; it has eval/sampled/accuracy, eval/greedy/accuracy, "
      r'eval/sampled/reward\n',
      err,
    )


def test_search_without_optuna(launch):
  (launch.cwd / 'optuna.py').write_text("raise ImportError('no optuna')")
  code, out, err = launch('WHAT = {}' + SEARCH)
  assert code == 2
  assert err == "error: search needs a package (no optuna): pip install 'reasonrl[sweep]'\n"
