"""The figures of the STaR experiment, from two invented runs of each arm."""

import json

import pytest

from reasonrl.experiments.star_addition import figure


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def held_out(phase, one, two):
  both = {f'{figure.BY}{n}': value for n, value in ((1, one), (2, two))}
  return {'kind': 'eval', 'phase': phase, figure.OVERALL: (one + two) / 2, **both}


def collected(solved, rationalized):
  counts = {'problems': 10, 'solved': solved, 'rationalized': rationalized, 'samples': 14}
  counts |= {'kept': solved + rationalized, 'sampled_tokens': 500}
  row = {f'collect/{name}': value for name, value in counts.items()}
  return {'kind': 'train', 'phase': 'collect', 'timing/step_s': 30.0, **row}


def star(folder, end):
  learned = {'kind': 'train', 'phase': 'sft', 'timing/step_s': 15.0, 'tokens': 70}
  pretrained = {'kind': 'train', 'phase': 'pretrain', 'timing/step_s': 999.0, 'tokens': 999}
  rows = [pretrained, held_out('pretrain', 0.5, 0.1), collected(4, 2), learned, learned]
  rows += [held_out('sft', 0.8, 0.2), collected(6, 3), learned, held_out('sft', 1.0, end)]
  write(folder / 'metrics.jsonl', rows)
  trace = lambda hinted, value: {'hinted': hinted, 'parts': {'addition/trace': value}}
  write(folder / 'datasets' / 'collect-0.jsonl', [trace(False, 1.0), trace(True, 0.0)])
  write(folder / 'datasets' / 'collect-1.jsonl', [trace(True, 1.0)])


def test_what_is_written(tmp_path):
  star(tmp_path / 'rationalize-0', 0.4)
  star(tmp_path / 'rationalize-1', 0.6)
  sampled = {'completions': 8, 'completion_length': 25.0, 'timing/step_s': 60.0, 'tokens': 200}
  rows = [held_out('pretrain', 0.5, 0.1), {'kind': 'train', 'phase': 'rl', **sampled}]
  write(tmp_path / 'grpo-0' / 'metrics.jsonl', [*rows, held_out('rl', 0.7, 0.1)])
  found = figure.load(tmp_path)
  assert {arm: len(runs) for arm, runs in found.items()} == {'rationalize': 2, 'grpo': 1}
  last = found['rationalize'][0]['iterations'][-1]
  assert last['digits'] == {'1': 1.0, '2': 0.4} and last['accuracy'] == pytest.approx(0.7)
  assert (last['seconds'], last['trained_tokens'], last['sampled_tokens']) == (105, 210, 1000)
  text = figure.tables(found)
  # t(.975, 1) = 12.7062, sd of (.4, .6) = .141421: half width 1.270620
  cells = ('0.750 ± 0.635', '0.625 ± 0.318', '1.000 ± 0.000', '0.500 ± 1.271')
  assert f'| STaR with rationalisation | 2 | {" | ".join(cells)} |' in text
  assert '| base | 2 | 0.300 ± 0.000 |' in text
  assert '0.600 ± 0.000 → 0.900 ± 0.000 | 1.000 ± 0.000, 0.500 ± 0.000 |' in text
  assert '| STaR with rationalisation | 28 | 1,000 | 210 | 1.8 |' in text
  assert '| GRPO | 8 | 200 | 200 | 1.0 |' in text
  # The mean of the iterations is .6 for seed 0, GRPO's one .4.
  assert '- GRPO: 0.200 (+0.200)' in text
  figure.draw_digits(found, tmp_path / 'digits.png')
  figure.draw_tokens(found, tmp_path / 'tokens.png')
  assert (tmp_path / 'digits.png').stat().st_size and (tmp_path / 'tokens.png').stat().st_size
