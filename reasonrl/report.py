"""A run for a reader: curves.png and a self-contained report.html.

    python -m reasonrl.report --workdir=runs/r1_zero-20260131-235959

Reads what logs.py wrote, also while the run is still going; what a run did not log is not drawn.
The x axis is the step of the phase, or, where a panel spans several, counted over all.
"""

from __future__ import annotations

import base64
import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from absl import flags

from reasonrl import command_line, curves, logs, records

# Metrics that a reader looks for first; the rest of a table is folded.
SHORT = (
  *('greedy/accuracy', 'sampled/accuracy', 'sampled/completion_length', 'sampled/think_length'),
  *('sampled/truncated', 'sampled/reward', 'loss', 'reward', 'accuracy', 'completion_length'),
  *('think_length', 'entropy', 'grad_norm', 'kl'),
)


def html(workdir: str | pathlib.Path) -> pathlib.Path:
  """Writes report.html, one file with everything inside, and returns its path."""
  workdir = pathlib.Path(workdir)
  rows = logs.read_rows(workdir / logs.METRICS)
  picture = base64.b64encode(curves.write(workdir).read_bytes()).decode('ascii')
  last = {row['phase']: row for row in rows if row['kind'] == 'train'}
  environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
  text = environment.from_string(TEMPLATE).render(
    name=workdir.resolve().name,
    headline=curves.headline(rows),
    picture=picture,
    evaluations=_table([row for row in rows if row['kind'] == 'eval'], 'eval/'),
    finals=_table(list(last.values()), ''),
    transcripts=_chosen(logs.read_rows(workdir / logs.ROLLOUTS), rows),
    files=[
      (name, (workdir / name).read_text(encoding='utf-8'))
      for name in ('config.json', 'env.json')
      if (workdir / name).exists()
    ],
  )
  path = workdir / 'report.html'
  path.write_text(text, encoding='utf-8', errors='backslashreplace')
  return path


def _table(rows: Sequence[Mapping[str, Any]], prefix: str) -> list[list[str]]:
  """Header and body: one line for a metric whose name starts with prefix, one column for a row."""
  if not rows:
    return []
  metrics = sorted({k for row in rows for k in row if k.startswith(prefix)})
  header = ('step', 'phase', 'iteration', 'phase_step', 'kind')
  metrics = [k for k in metrics if k not in header and not k.endswith('/outcomes')]

  def cell(value):
    return f'{value:.4g}' if isinstance(value, int | float) else ''

  head = ['', *(_place(row) for row in rows)]
  metrics.sort(key=lambda name: name.removeprefix(prefix) not in SHORT)
  lines = [[key, *(cell(row.get(key)) for row in rows)] for key in metrics]
  first = sum(name.removeprefix(prefix) in SHORT for name in metrics)
  return [head, lines[:first], lines[first:]]


def _place(row: Mapping[str, Any]) -> str:
  """'rl 60', or in a later iteration of a loop 'sft-3 40'."""
  iteration = f'-{row["iteration"]}' if row.get('iteration') else ''
  return f'{row["phase"]}{iteration} {row["phase_step"]}'


def _chosen(samples, rows):
  """Held-out rollouts before reinforcement and at the end, and training rollouts halfway.

  Returns:
    (title, pieces of rollouts), in order.
  """
  began = min((row['step'] for row in curves.rows_with(rows, 'reinforce', 'reward')), default=0)
  groups = collections.defaultdict(list)
  for row in samples:
    groups[row['step'], row['kind'] == 'eval'].append(row)
  held_out = sorted(step for step, evaluated in groups if evaluated)
  trained = sorted(step for step, evaluated in groups if not evaluated and step >= began)
  base = [step for step in held_out if step < began][-1:] or held_out[:1]
  keys = [(step, False) for step in trained[len(trained) // 2 :][:1]]
  keys += [(step, True) for step in {*base, *held_out[-1:]}]
  out = []
  for step, evaluated in sorted(keys):
    chosen = groups[step, evaluated]
    what = 'held-out' if evaluated else 'training samples'
    title = f'{_place(chosen[0])}, {what}'
    out.append((title, [_pieces(row) for row in chosen[:8]]))
  return out


def _pieces(row: Mapping[str, Any]) -> dict[str, Any]:
  """A transcript cut where its colours change."""
  before, think, after = records.split_think(row['completion'])
  verdict = 'right' if row['right'] else 'wrong'
  facts = [f'{name} {row[name]:.3g}' for name in ('reward', 'advantage') if row[name] is not None]
  facts = [verdict, f'expected {row["answer"]}', *facts, f'{row["length"]} tokens', row['stop']]
  facts += [row['mode']] if 'mode' in row else []
  return {
    'prompt': row['prompt'],
    'before': before,
    'think': think,
    'after': after,
    'verdict': verdict,
    'facts': '  '.join(facts),
  }


TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ name }}</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.4rem; margin-bottom: 0 } h2 { margin-top: 2.5rem }
img { width: 100%; min-width: 44rem }
table { border-collapse: collapse; font-size: 13px } .wide { overflow-x: auto }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; font-weight: 400 }
td:first-child { text-align: left; font-family: monospace } th { color: #666 }
pre, .sample { font: 13px/1.45 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.sample { border-left: 4px solid #bbb; padding: .3rem .8rem; margin: .8rem 0 }
.right { border-color: #009e73 } .right b { color: #00704f }
.wrong { border-color: #d55e00 } .wrong b { color: #b04a00 }
.prompt, .facts { color: #777 } .think { color: #0067a3 }
</style>
<h1>{{ name }}</h1><p>{{ headline }}</p>
<div class="wide"><img alt="curves of {{ name }}" src="data:image/png;base64,{{ picture }}"></div>
{% for title, table in (('Held-out evaluation', evaluations), ('Last training step', finals)) %}
{% if table %}
<h2>{{ title }}</h2>
{% for lines in table[1:] %}{% if lines %}
{% if loop.index == 2 %}<details><summary>{{ lines | length }} more</summary>{% endif %}
<div class="wide"><table>
<tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for line in lines %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if loop.index == 2 %}</details>{% endif %}
{% endif %}{% endfor %}
{% endif %}
{% endfor %}
{% if transcripts %}
<h2>Transcripts</h2>
<p>Grey: the prompt. Blue: thinking. Then what was said, green where right, red where wrong.</p>
{% for title, rows in transcripts %}
<h3>{{ title }}</h3>
{% for row in rows %}
<div class="sample {{ row.verdict }}"><span class="prompt">{{ row.prompt }}</span>
<b>{{ row.before }}</b><span class="think">{{ row.think }}</span><b>{{ row.after }}</b>
<span class="facts">{{ row.facts }}</span></div>
{% endfor %}
{% endfor %}
{% endif %}
{% for file, text in files %}
<details><summary>{{ file }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
</html>
"""


def write(workdir: str | pathlib.Path) -> None:
  """Both files, and a line that says where they are."""
  page = html(workdir)
  print(f'report: {page} and {page.with_name("curves.png")}')


def main(argv: list[str]) -> None:
  if argv[1:] or not flags.FLAGS.workdir:
    raise records.UserError('give --workdir=FOLDER and nothing else')
  write(flags.FLAGS.workdir)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run.')  # not above: launch has one too
  command_line.guarded(main, flags.FLAGS, '')
