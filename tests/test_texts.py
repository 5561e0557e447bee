"""Texts to be read: VarChain, whose tokens have known kinds, files, and rows of them."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from reasonrl import data, positions, records, tokenizers
from reasonrl.configs import common
from reasonrl.tasks import TASKS, text, varchain

BYTES = tokenizers.Bytes()


def world(**changes):
  fields = common.varchain().to_dict()
  return varchain.VarChain(**{k: v for k, v in (fields | changes).items() if k != 'name'})


def compute(formulas, modulus):
  """The values of 'a=3;b=a+4;...', computed by Python alone."""
  values = {}
  for formula in formulas.split(';')[:-1]:
    name, expression = formula.split('=')
    values[name] = eval(expression, {}, values) % modulus  # noqa: S307  (of our own making)
  return values


def test_a_text_and_its_kinds_by_hand():
  task = world(thought_probability=0.0, num_words=4, min_words=2, max_words=2)
  example = task.example('train', 0)
  said, spans = example.solution, example.meta[records.CLASSES]
  assert (example.problem, example.answer, example.meta[records.TEXT]) == ('', '', records.WHOLE)
  assert ''.join(said[a:b] for a, b, _, _ in spans) == said  # they cover it, in order
  kinds = ''.join({'syntax': 's', 'random': 'r', 'markov': 'm'}.get(k, 'A') for *_, k, _ in spans)
  formulas, asked = re.fullmatch(r'((?:[a-h]=[^;?]+;)+)(\?[a-h]=\d;)\w+', said).groups()
  hops = formulas.count(';') - 1
  # a=D;   b=aOD; for each hop, of which the first is certain   ?v=D;   word word
  chain = ''.join('rssrrs' if n else 'sssrrs' for n in range(hops))
  assert kinds == 'ssrs' + chain + ('s' if hops == 3 else 'r') + 'ssAs' + 'rm'
  (answer,) = [span for span in spans if span[3]]
  values = compute(formulas, 5)
  assert (said[answer[0]], answer[2]) == (str(values[asked[1]]), f'answer_{hops}')
  assert answer[3] == ''.join(f'{v}{values[v]}' for v in 'bcdefgh'[:hops])


@pytest.mark.parametrize('modulus, hops', [(2, 7), (10, 4), (5, 1)])
def test_every_answer_is_computed_right(modulus, hops):
  task = world(modulus=modulus, max_hops=hops, segments=2, thought_probability=0.0)
  for i in range(100):
    for formulas, name, answer in re.findall(
      r'((?:[a-h]=[^;?]+;)+)\?([a-h])=(\d);', task.example('test', i).solution
    ):
      assert int(answer) == compute(formulas, modulus)[name]


def test_thoughts_are_as_often_and_as_right_as_asked():
  often = {'thought_probability': 0.4, 'thought_at_answer_probability': 0.5}
  task = world(segments=1, thought_kinds=(0.5, 0.2, 0.3), error_probability=0.0, **often)
  found = [task.example('train', i).solution for i in range(4000)]
  thoughts = [re.search(r'^(.*)<think>(.*)</think>(.)', s) for s in found if '<think>' in s]
  assert len(thoughts) / 4000 == pytest.approx(0.4, abs=0.03)
  assert all(t[1] for t in thoughts)  # there is something to think about
  at_answer = [t for t in thoughts if re.search(r'\?[a-h]=$', t[1])]
  assert len(at_answer) / len(thoughts) == pytest.approx(0.52, abs=0.04)  # uniform ones among them
  counts = {'full': 0, 'first': 0, 'junk': 0}
  long = 0
  for t in at_answer:
    values = compute(re.match(r'((?:[a-h]=[^;?]+;)+)', t[1])[0], 5)
    full = ''.join(f'{v}{values[v]}' for v in list(values)[1:])
    if len(values) == 2:
      continue  # of one hop the first is all
    long += 1
    kind = 'full' if t[2] == full else 'first' if t[2] == full[:2] else 'junk'
    counts[kind] += 1
    assert kind != 'junk' or re.fullmatch(r'[.!]{1,4}', t[2])
  for kind, share in (('full', 0.5), ('first', 0.2), ('junk', 0.3)):
    assert counts[kind] / long == pytest.approx(share, abs=0.05)
  others = [t[2] for t in thoughts if not re.search(r'\?[a-h]=$', t[1])]
  assert all(re.fullmatch(r'[.!]{1,2}', said) for said in others)
  wrong = world(error_probability=1.0, thought_kinds=(1.0, 0.0, 0.0), modulus=2)
  told = [wrong.example('train', i).solution for i in range(3000)]
  hits = []
  for said in told:
    if t := re.search(r'^(.*\?[a-h]=)<think>b(\d)', said):
      hits.append(int(t[2]) == compute(re.match(r'((?:[a-h]=[^;?]+;)+)', t[1])[0], 2)['b'])
  assert np.mean(hits) == pytest.approx(0.5, abs=0.06)


def test_words_follow_one_chain_whatever_the_seed():
  task = world(min_words=30, max_words=30, num_words=4, thought_probability=0.0)
  pairs = np.zeros((4, 4))
  for seed, i in itertools.product(range(2), range(200)):
    said = dataclasses.replace(task, seed=seed).example('train', i).solution.rpartition(';')[2]
    words = [varchain.WORDS.index(said[k : k + 2]) for k in range(0, len(said), 2)]
    np.add.at(pairs, (words[:-1], words[1:]), 1)
  chain = np.diff(np.asarray(task._chain), axis=1, prepend=0)
  np.testing.assert_allclose(pairs / pairs.sum(1, keepdims=True), chain, atol=0.03)
  assert chain.max(1).min() > 0.3  # some words are likely: there is something to learn


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'modulus': 11}, 'modulus=11 is not from 2 to 10'),
    ({'min_hops': 4}, 'min_hops=4 is not from 1 to 3'),
    ({'form': 'poem'}, "form='poem' is not one of text, question"),
    ({'thought_probability': 1.5}, 'thought_probability=1.5 is not a probability'),
    ({'thought_kinds': (0.5, 0.1, 0.1)}, 'three probabilities, sum 1'),
  ],
)
def test_worlds_that_are_refused(changes, message):
  with pytest.raises(records.UserError, match=message):
    world(**changes)


# ------------------------------------------------------------------------------------ files


def texts(path, **changes):
  fields = {'seed': 0, 'train': str(path), 'test': str(path), 'field': 'text', 'separator': '\n\n'}
  return TASKS['text'](**(fields | {'max_chars': 12, **changes}))


@pytest.mark.parametrize('most', [1, 3, 7, 100])
def test_passages_are_the_text(most):
  said = 'One two three.\nFour-five six  seveneight'
  parts = text.passages(said, most)
  assert ''.join(parts) == said and all(0 < len(part) <= most for part in parts)


def test_passages_end_behind_white_space():
  assert text.passages('aa bb ccccccc d', 6) == ['aa bb ', 'cccccc', 'c d']


def test_plain_and_json_files_give_the_same_passages(tmp_path):
  plain, rows = tmp_path / 'a.txt', tmp_path / 'a.jsonl'
  plain.write_text('Once upon a time\n\n there was.\n\n')
  rows.write_text('{"body": "Once upon a time"}\n{"body": "there was."}\n')
  for task in (texts(plain), texts(rows, field='body')):
    found = [task.example('train', i) for i in range(task.epoch('train'))]
    pairs = {(e.solution, e.meta[records.TEXT]) for e in found}
    assert pairs == {('Once upon a ', 'part'), ('time', 'whole'), ('there was.', 'whole')}
    assert {(e.problem, e.answer) for e in found} == {('', '')}


@pytest.mark.parametrize(
  'content, message',
  [
    ('{"text": 1}\n', "line 1: no 'text' of type str; its keys: text"),
    (None, 'cannot read'),
    ('', 'has no rows'),
  ],
)
def test_bad_files_say_where(tmp_path, content, message):
  path = tmp_path / 'a.jsonl'
  if content is not None:
    path.write_text(content)
  with pytest.raises(records.UserError, match=message):
    texts(path).example('train', 0)
  with pytest.raises(records.UserError, match='has no text'):
    (tmp_path / 'b.txt').write_text(' \n\n ')
    texts(tmp_path / 'b.txt').example('train', 0)


def test_a_text_is_a_row_that_is_cut_and_ends_with_eos_where_it_ends():
  whole = records.Example('t', 'train', 0, '', '', 'abcd', {records.TEXT: records.WHOLE})
  part = dataclasses.replace(whole, meta={records.TEXT: records.PART})
  ids, eos = BYTES.encode('abcd'), BYTES.eos_ids[0]
  row = lambda example, size, prompt=(): data.supervised_sequence(BYTES, prompt, '', example, size)
  assert row(whole, 9).tokens_T.tolist() == [*ids, eos]
  assert row(part, 9).tokens_T.tolist() == ids
  assert row(whole, 3).tokens_T.tolist() == ids[:3]  # no EOS in the middle
  assert row(whole, 9).index_M.tolist() == [1, 2, 3, 4]  # nothing predicts the first token
  assert row(whole, 9, [99]).index_M.tolist() == [1, 2, 3, 4, 5]  # but BOS does
  # Nobody learns where a thought begins, but all that it says, and its end.
  thinks = world(thought_probability=1.0).example('train', 0)
  (span,) = thinks.meta[records.UNTRAINED]
  assert thinks.solution[slice(*span)] == '<think>'
  seq = row(thinks, 99)
  (opened,) = np.flatnonzero(seq.tokens_T == BYTES.encode_user('<think>'))
  assert seq.index_M.tolist() == [t for t in range(1, seq.tokens_T.size) if t != opened]
  # What a text says can never become a control token.
  told = dataclasses.replace(whole, solution=BYTES.id_to_piece(eos))
  assert BYTES.encode(told.solution) == [eos] and eos not in row(told, 99).tokens_T[:-1]


# ------------------------------------------------------------------------------------ positions


def choose(sampler, last=9, count=2, weights=None, kinds=None, seed=0, among=()):
  kinds = kinds or [''] * (last + 1)
  rng = np.random.default_rng(seed)
  return positions.choose(sampler, rng, last, count, 4, kinds, weights or {}, among)


def test_positions_by_hand():
  assert choose('all', last=3) == [1, 2, 3]
  assert choose('every_k') == [4, 8]
  assert choose('uniform', last=3, count=9) == [1, 2, 3]  # no more than there are
  assert choose('topq_entropy', among=np.asarray([5])) == [5]


def test_drawn_positions_are_uniform_and_differ():
  counts = np.zeros(10)
  for seed in range(4000):
    found = choose('uniform', seed=seed)
    assert len(set(found)) == 2 and found == sorted(found)
    counts[found] += 1
  assert counts[0] == 0
  np.testing.assert_allclose(counts[1:] / 8000, 1 / 9, atol=0.02)


def test_kinds_are_chosen_with_their_weights():
  kinds = ['', 'a', 'answer_1', 'a', 'b', 'answer_2', 'b', 'b', 'b', 'b']
  weights = {'answer': 0.5, 'a': 0.1, 'none': 0.1}
  counts = np.zeros(10)
  for seed in range(6000):
    counts[choose('class', count=1, weights=weights, kinds=kinds, seed=seed)] += 1
  rest = 0.4 / 9
  np.testing.assert_allclose(counts[[2, 5]] / 6000, 0.5 / 2 + rest, atol=0.02)
  np.testing.assert_allclose(counts[[1, 3]] / 6000, 0.1 / 2 + rest, atol=0.02)
  np.testing.assert_allclose(counts[[4, 6]] / 6000, rest, atol=0.02)


def test_uncertain_positions_by_hand():
  entropy_T = [9.0, 0.1, 0.4, 0.3, 0.2, 9.0]  # position 0 has no context, 5 no room behind it
  assert positions.uncertain(entropy_T, 4, 0.5).tolist() == [2, 3]
  assert positions.uncertain(entropy_T, 4, 0.01).tolist() == [2]


def test_kinds_of_tokens_are_those_of_their_first_characters():
  ids = [BYTES.bos_id or 0, *BYTES.encode_user('é2;x'), BYTES.eos_ids[0]]
  spans = [[0, 1, 'letter', ''], [1, 3, 'pair', 't'], [4, 9, 'later', '']]
  found = positions.classes(BYTES, ids, 1, spans)
  assert found[0] == found[-1] == ('', '')
  # The second byte of a letter comes when one replacement character has been read.
  assert found[1] == ('letter', '') and found[3:6] == [('pair', 't'), ('pair', 't'), ('', '')]
  assert positions.classes(BYTES, ids, 1, ()) == [('', '')] * len(ids)
