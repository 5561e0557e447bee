"""The sampler against transformers' generate, google-tunix and llama.cpp, on SmolLM2-135M.

  python -m venv .venv-transformers; .venv-transformers/bin/pip install torch transformers
  python -m venv .venv-tunix;        .venv-tunix/bin/pip install google-tunix      # Python 3.12
  python -m venv .venv-llama;        .venv-llama/bin/pip install llama-cpp-python gguf safetensors
  python experiments/bench/sampler/against_peers.py

Engines whose environment is not there are left out, and the table says so. Every engine is a
process of its own that keeps its weights loaded; all have the same ones, all may use both cores
and get large pages of memory.
First every engine continues eight texts greedily: in float32 all must agree on every token, in
bfloat16 on the first eight of 32 in the mean. Then, for every shape, the engines take turns: 64
tokens of prompt, 64 or 256 new ones at temperature 1 without truncation; 8 samples of each prompt,
or one of one. No token ends a sample. The first turn is not timed.

Writes against_peers.json and the table against_peers.md beside this file.

  tok/s     new tokens per second, prompts and all: the median, and the ratio of ours to it in the
            same turn
  roofline  time in which the machine could do it, at the rates measured before the same turn, over
            the time it took, a median: see roofline.py
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import roofline
from absl import app, flags, logging

from reasonrl.experiments import processor, smollm2

HERE = pathlib.Path(__file__).parent
WORKDIR = flags.DEFINE_string('workdir', 'runs/bench_sampler', 'Where the weights are written.')
PEERS = flags.DEFINE_string('peers', '.', 'Folder with the environments .venv-*.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed turns.')
ROWS = flags.DEFINE_list('rows', ['1', '8', '64'], 'Samples at a time.')
NEW = flags.DEFINE_list('new', ['64', '256'], 'New tokens of each.')
HALF = flags.DEFINE_bool('bfloat16', True, 'False: float32 alone, on CPUs without such products.')
PROMPT, SAMPLES, GREEDY = 64, 8, 32

# name -> (environment, script, its arguments)
ENGINES = {
  'ours, bfloat16': ('', 'ours.py', 'bfloat16'),
  'ours, float32': ('', 'ours.py', 'float32'),
  'transformers, bfloat16': (
    '.venv-transformers',
    'transformers_generate.py',
    'bfloat16',
    'dynamic',
  ),
  'transformers, bfloat16, static cache (not compiled)': (
    *('.venv-transformers', 'transformers_generate.py'),
    *('bfloat16', 'static'),
  ),
  'transformers, float32': ('.venv-transformers', 'transformers_generate.py', 'float32', 'dynamic'),
  'tunix, float32': ('.venv-tunix', 'tunix_sampler.py', 'float32'),
  'tunix, bfloat16': ('.venv-tunix', 'tunix_sampler.py', 'bfloat16'),
  'llama.cpp, bfloat16': ('.venv-llama', 'llama_cpp_batch.py', 'bfloat16'),
  'llama.cpp, float32': ('.venv-llama', 'llama_cpp_batch.py', 'float32'),
}


class Engine:
  """A process that answers requests, see engines/protocol.py."""

  def __init__(self, name: str, folder: pathlib.Path):
    environment, script, *args = ENGINES[name]
    python = (
      pathlib.Path(PEERS.value) / environment / 'bin/python' if environment else sys.executable
    )
    if environment and not python.exists():
      raise FileNotFoundError(f'no {python}')
    command = [str(python), HERE / 'engines' / script, folder, *args]
    log = open(folder / f'{name}.log', 'w')  # noqa: SIM115, as long as the process
    self.name, self.log = name, log.name
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
      env=processor.environment(),
    )
    self._answer()

  def __call__(self, **request) -> dict:
    print(json.dumps(request), file=self.process.stdin, flush=True)
    return self._answer()

  def _answer(self):
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f'{self.name} ended with {self.process.wait()}: see {self.log}')
    return json.loads(line)


def agree(engines: list[Engine], prompts) -> dict[str, float]:
  """Greedy tokens equal to those of our float32 before the first difference, of GREEDY, a mean.

  Raises:
    AssertionError: engines of float32 differ, or one of bfloat16 in the first quarter.
  """
  ask = lambda engine: engine(prompts=prompts, samples=1, new=GREEDY, temperature=0, seed=0)
  found = {engine.name: np.asarray(ask(engine)['tokens']) for engine in engines}
  equal = {}
  for name, tokens in found.items():
    same = np.cumprod(tokens == found['ours, float32'], axis=1).sum(1)
    equal[name] = float(same.mean())
    if 'float32' in name:
      assert (same == GREEDY).all(), f'{name} is another model: {same}'
    assert same.mean() > GREEDY / 4, f'{name} is another model: {same}'
  return equal


def table(result: dict) -> str:
  times, rates = result['seconds'], result['machine']
  rates = {name: np.median([rate[name] for rate in rates]) for name in rates[0]}
  shapes = list(next(iter(times.values())))
  lines = ['| | ' + ' | '.join(f'{shape} tok/s' for shape in shapes) + ' |']
  lines.append('|' + '---|' * (1 + len(shapes)))
  ours = [times[name] for name in ('ours, bfloat16', 'ours, float32') if name in times]
  for name, by_shape in times.items():
    cells = []
    for shape in shapes:
      rows, new = map(int, shape.split(' x '))
      seconds = np.asarray(by_shape[shape])
      share = np.median(np.asarray(result['floor'][name][shape]) / seconds)
      cell = f'{rows * new / np.median(seconds):.0f} ({share:.0%}'
      if not name.startswith('ours'):
        ratios = [np.median(seconds / np.asarray(our[shape])) for our in ours]
        cell += f'; {", ".join(f"{ratio:.1f}" for ratio in ratios)} x'
      cells.append(cell + ')')
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  peak = ', '.join(f'{rates[dtype] / 1e9:.0f} G {dtype}' for dtype in ('float32', 'bfloat16'))
  about = (
    f'{result["repeats"]} turns. Rows x new tokens. In brackets: share of the roofline; how many '
    f'times as fast ours is{" in bfloat16, in float32" if len(ours) > 1 else ""}.\n'
    f'{result["processor"]}: {rates["bandwidth"] / 1e9:.1f} GB/s read, operations per second '
    f'{peak}.\n'
    f'Equal greedy tokens of {GREEDY}: '
    + ', '.join(f'{name} {n:.1f}' for name, n in result['equal'].items())
    + '.\n'
    + (f'Left out: {"; ".join(result["left_out"])}.\n' if result['left_out'] else '')
  )
  return about + '\n' + '\n'.join(lines) + '\n'


def main(_) -> None:
  folder = pathlib.Path(WORKDIR.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  model, prompts = smollm2.write(folder), smollm2.pieces(8, PROMPT)
  engines, left_out = [], []
  for name in ENGINES:
    if 'bfloat16' in name and not HALF.value:
      continue
    try:
      engines.append(Engine(name, folder))
    except FileNotFoundError as error:
      left_out.append(f'{name} ({error})')
  result = {'processor': processor.name(), 'repeats': REPEATS.value, 'machine': []}
  result['left_out'] = left_out
  result['equal'] = agree(engines, prompts)
  logging.info('equal greedy tokens: %s', result['equal'])
  result['seconds'] = {engine.name: {} for engine in engines}
  result['floor'] = {engine.name: {} for engine in engines}
  for rows in map(int, ROWS.value):
    for new in map(int, NEW.value):
      shape, samples = f'{rows} x {new}', min(rows, SAMPLES)
      for turn in range(REPEATS.value + 1):
        rates = roofline.rates()
        if turn:
          result['machine'].append({name: float(f'{rate:.3g}') for name, rate in rates.items()})
        for engine in engines:
          asked = {'prompts': prompts[: rows // samples], 'samples': samples}
          answer = engine(**asked, new=new, temperature=1, seed=turn)
          tokens = np.asarray(answer['tokens'])
          assert tokens.shape == (rows, new), f'{engine.name}: {tokens.shape}, not {shape}'
          if turn:
            dtype = 'float32' if 'float32' in engine.name else 'bfloat16'
            least = roofline.floor(model, rows // samples, PROMPT, rows, new, dtype, dtype, rates)
            for kind, seconds in (('seconds', answer['seconds']), ('floor', least)):
              result[kind][engine.name].setdefault(shape, []).append(round(seconds, 3))
      for engine in engines:
        spent = result['seconds'][engine.name][shape]
        logging.info('%s, %s: %s s', shape, engine.name, spent)
      (HERE / 'against_peers.json').write_text(json.dumps(result, indent=1) + '\n')
      (HERE / 'against_peers.md').write_text(table(result))
  print(table(result))


if __name__ == '__main__':
  app.run(main)
