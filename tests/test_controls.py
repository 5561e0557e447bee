"""Sampler controls: by hand, against a plain Python decoder, and inside the sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl import controls, records, sampling, sharding, tokenizers, types
from reasonrl.configs import common
from reasonrl.controls import base, think_budget
from reasonrl.models import decoder

EOS, OPEN, CLOSE, SHUT, WAIT, FINAL = range(6)
BUDGET = controls.ThinkBudget(
  start=(), end=((CLOSE,),), end_ids=(CLOSE,), wait=(WAIT,), final=(CLOSE, FINAL)
)


# ------------------------------------------------------------------------------------ by hand


def run(control, policy, numbers, cap=40, start=2):
  """One row, step by step; `policy`: tokens said so far -> what it draws next.

  Returns:
    tokens, and whether the policy drew each.
  """
  return run_all((control,), policy, numbers, cap, start)


def run_all(applied, policy, numbers, cap=40, start=2):
  """`run` with several controls, one after the other, as the sampler applies them."""
  tokens_BS, start_B = jnp.full((1, start + cap), 99, jnp.int32), jnp.full(1, start, jnp.int32)
  numbers = {name: jnp.full(1, value, jnp.int32) for name, value in numbers.items()}
  first = controls.View(tokens_BS, start_B, start_B)
  states, said, own = tuple(control.begin(first) for control in applied), [], []
  while len(said) < cap:
    view = controls.View(tokens_BS, start_B + len(said), start_B)
    drawn_B = jnp.full(1, policy(said), jnp.int32)
    made, states = controls.apply(applied, states, numbers, view, drawn_B, jnp.asarray([EOS]))
    keep, written = len(said) - int(made.back_B[0]), bool(made.written_B[0])
    said, own = [*said[:keep], int(made.token_B[0])], [*own[:keep], not written]
    tokens_BS = tokens_BS.at[0, start + keep].set(said[-1])
    if said[-1] == EOS and not written:
      break
  return said, own


def thinker(steps, end=(CLOSE,), answer=(20, EOS)):
  """Thinks `steps` tokens after the start or the last wait, ends, answers."""

  def policy(said):
    done = max((i + 1 for i, t in enumerate(said) if t in (CLOSE, FINAL, SHUT)), default=None)
    closed = done is not None and (said[done - 1] != CLOSE or end == (CLOSE,) or SHUT in said)
    if closed:
      return answer[min(len(said) - done, len(answer) - 1)]
    since = max((i + 1 for i, t in enumerate(said) if t == WAIT), default=0)
    n = len(said) - since
    return 10 + n if n < steps else end[min(n - steps, len(end) - 1)]

  return policy


def numbers(max_think=0, min_think=0, ignores=0):
  return {'max_think': max_think, 'min_think': min_think, 'ignores': ignores}


def test_without_a_budget_nothing_changes():
  said, own = run(BUDGET, thinker(3), numbers())
  assert said == [10, 11, 12, CLOSE, 20, EOS] and all(own)


def test_two_ignored_ends():
  """Methods text: ends after 3 tokens, 2 ignored, cap 100: 3 segments, 2 waits, 11 tokens."""
  said, own = run(BUDGET, thinker(3), numbers(max_think=100, ignores=2))
  think = [10, 11, 12, WAIT, 10, 11, 12, WAIT, 10, 11, 12]
  assert said == [*think, CLOSE, 20, EOS] and len(think) == 11
  assert [i for i, drawn in enumerate(own) if not drawn] == [3, 7]


def test_the_maximum_ends_thinking():
  """A cap of 5: exactly 5 tokens of thinking, then the final answer."""
  said, own = run(BUDGET, thinker(9), numbers(max_think=5))
  assert said == [10, 11, 12, 13, 14, CLOSE, FINAL, 20, EOS]
  assert [i for i, drawn in enumerate(own) if not drawn] == [5, 6]
  said, _ = run(BUDGET, thinker(3), numbers(max_think=5, ignores=2))
  assert said == [10, 11, 12, WAIT, 10, CLOSE, FINAL, 20, EOS]  # a wait counts
  said, _ = run(BUDGET, thinker(5), numbers(max_think=5))
  assert said[5:7] == [CLOSE, FINAL]  # it would have ended by itself one token later


def test_the_minimum_is_reached_by_waits():
  said, own = run(BUDGET, thinker(3), numbers(min_think=6))
  assert said == [10, 11, 12, WAIT, 10, 11, 12, CLOSE, 20, EOS]
  assert own.count(False) == 1


def test_a_wait_that_the_maximum_cuts():
  control = dataclasses.replace(BUDGET, wait=(WAIT, 30, 31))
  said, _ = run(control, thinker(3), numbers(max_think=5, ignores=9))
  assert said == [10, 11, 12, WAIT, 30, CLOSE, FINAL, 20, EOS]


def test_a_stop_id_inside_thinking_is_an_end():
  def policy(said):
    return [10, 11, EOS][len(said)] if len(said) < 3 else (20 if said[-1] != 20 else EOS)

  said, own = run(BUDGET, policy, numbers())
  assert said == [10, 11, CLOSE, 20, EOS] and own == [True, True, False, True, True]
  said, own = run(BUDGET, policy, numbers(ignores=1))
  assert said[:3] == [10, 11, WAIT] and own[:3] == [True, True, False]


def test_an_end_of_several_tokens_is_taken_back():
  control = dataclasses.replace(
    BUDGET, end=((CLOSE,), (SHUT,)), end_ids=(CLOSE, SHUT), final=(CLOSE, SHUT, FINAL)
  )
  said, own = run(control, thinker(3, end=(CLOSE, SHUT)), numbers(ignores=1))
  assert said == [10, 11, 12, WAIT, 10, 11, 12, CLOSE, SHUT, 20, EOS]
  assert [i for i, drawn in enumerate(own) if not drawn] == [3]
  # half of an end is thinking, and the half before thinking began is none of it
  assert run(control, lambda said: [CLOSE, 10, CLOSE, SHUT, EOS][len(said)], numbers())[0] == [
    *(CLOSE, 10, CLOSE, SHUT, EOS)
  ]


def test_thinking_that_begins_later():
  control = dataclasses.replace(BUDGET, start=((OPEN,),))
  policy = lambda said: [7, CLOSE, OPEN, 10, 11, 12, 13, 14][min(len(said), 7)]
  said, _ = run(control, policy, numbers(max_think=2), cap=8)
  assert said == [7, CLOSE, OPEN, 10, 11, CLOSE, FINAL, 14]  # an end before it is no end


def test_thinking_that_the_prompt_began():
  control = dataclasses.replace(BUDGET, start=((OPEN,),))
  for last, cut in ((OPEN, True), (7, False)):
    tokens_BS = jnp.asarray([[7, last, *[99] * 8]], jnp.int32)
    view = controls.View(tokens_BS, jnp.full(1, 2), jnp.full(1, 2))
    assert (control.begin(view)['phase_B'][0] == think_budget.THINKING) == cut
  both = dataclasses.replace(BUDGET, start=((7,), (OPEN,)))
  assert both.begin(view)['phase_B'][0] == think_budget.BEFORE
  view = view._replace(tokens_BS=view.tokens_BS.at[0, 1].set(OPEN))
  assert both.begin(view)['phase_B'][0] == think_budget.THINKING


def test_ends_without_a_wait_stay():
  control = dataclasses.replace(BUDGET, wait=())
  said, own = run(control, thinker(3), numbers(max_think=9, ignores=2, min_think=8))
  assert said == [10, 11, 12, CLOSE, 20, EOS] and all(own)


# ------------------------------------------------------------------------------------ from a config


def section(name, **changes):
  out = common.controls(name)[name].to_dict()
  return {name: {**out, **changes}}


def test_strings_become_ids():
  tokenizer = tokenizers.Bytes()
  built, given = controls.build(section('think_budget', max_think=5), tokenizer)
  (budget,) = built
  assert given == {'max_think': 5, 'min_think': 0, 'ignores': 0}
  assert budget.wait == ()  # nothing asks for it
  ((asked,), _) = controls.build(section('think_budget', ignores=1), tokenizer)
  assert asked.wait == tuple(tokenizer.encode('Wait'))
  assert budget.end_ids == tuple(tokenizer.encode('</think>'))
  assert budget.end == tuple((i,) for i in budget.end_ids)  # no byte holds another
  both = section('force', text='ab') | section('forbid', texts=('b', 'cb'), forbidden=3)
  built, given = controls.build(both, tokenizer)
  assert built == (
    controls.Force(tuple(tokenizer.encode('ab'))),
    controls.Forbid(tuple(sorted(tokenizer.encode('bc')))),
  )
  assert given == {'forced': -1, 'forbidden': 3}


class Pairs:
  """Tokens of several characters, as byte pairs have them."""

  pieces = ('</', 'think', '>', '><', '.</', 'x', '>\n', 'thinking', 'axe')
  vocab_size = len(pieces)

  def encode(self, text):
    pieces = {'</think>': ('</', 'think', '>'), 'x': ('x',)}[text]
    return [self.pieces.index(piece) for piece in pieces]

  def decode(self, ids, skip_special):
    return ''.join(self.pieces[i] for i in ids)


def test_a_string_joined_to_what_is_beside_it():
  assert base.pattern(Pairs(), '</think>') == ((0, 4), (1,), (2, 3, 6))
  assert base.pattern(Pairs(), 'x') == ((5, 8),)


@pytest.mark.parametrize(
  'sections, message',
  [
    ({'brake': {}}, "controls: 'brake' is not one of force, forbid, think_budget"),
    ({'force': {'text': 'a'}}, 'controls.force: unknown or missing: forced'),
    (section('force', text='a', forced=1.5), 'forced=1.5 is not a whole number from -1 up'),
    (section('think_budget', max_think=-1), 'max_think=-1 is not a whole number from 0 up'),
    (section('forbid', texts='ab'), "texts='ab' must be a tuple of strings"),
    (section('force'), 'force: ids has no tokens'),
    (section('think_budget', end=''), 'think_budget: end has no tokens'),
    (section('think_budget', wait='', ignores=1), "wait='', but ignores and min_think write it"),
  ],
)
def test_bad_sections(sections, message):
  with pytest.raises(records.UserError, match=message):
    controls.build(sections, tokenizers.Bytes())


THREE = dataclasses.replace(
  BUDGET,
  end=((CLOSE,), (SHUT,), (OPEN,)),
  end_ids=(CLOSE, SHUT, OPEN),
  final=(CLOSE, SHUT, OPEN, FINAL),
)


def script(*tokens):
  """Draws these tokens at these positions, whatever the row holds."""
  return lambda said: tokens[min(len(said), len(tokens) - 1)]


def test_an_end_that_the_maximum_falls_into():
  """Three tokens and an end of three, at most 3, 4, 5 tokens: only at 3 is it `final`'s."""
  natural = script(10, 11, 12, CLOSE, SHUT, OPEN, 20, EOS)
  for limit in (4, 5, 6):
    said, own = run(THREE, natural, numbers(max_think=limit))
    assert said == [10, 11, 12, CLOSE, SHUT, OPEN, 20, EOS] and all(own)
  said, own = run(THREE, natural, numbers(max_think=3))
  assert said[:7] == [10, 11, 12, CLOSE, SHUT, OPEN, FINAL] and not any(own[3:7])


def test_what_only_began_like_an_end_is_cut_at_the_maximum():
  """CLOSE, SHUT and then no end: with at most 4 tokens two of them go again, with 5 one."""
  policy = script(10, 11, 12, CLOSE, SHUT, 13, 14, 15, 16, 17, EOS)
  for limit, think in (
    (4, [10, 11, 12, CLOSE]),
    (5, [10, 11, 12, CLOSE, SHUT]),
    (6, [10, 11, 12, CLOSE, SHUT, 13]),
  ):
    said, own = run(THREE, policy, numbers(max_think=limit))
    assert said[: limit + 4] == [*think, CLOSE, SHUT, OPEN, FINAL]
    assert own[: limit + 4] == [True] * limit + [False] * 4


def test_an_end_of_three_is_taken_back_until_the_minimum():
  """What is taken back does not count."""

  def policy(said):
    since = max((i + 1 for i, t in enumerate(said) if t == WAIT), default=0)
    return [10, 11, 12, CLOSE, SHUT, OPEN, 20, EOS][min(len(said) - since, 7)]

  said, own = run(THREE, policy, numbers(min_think=4))
  assert said == [10, 11, 12, WAIT, 10, 11, 12, CLOSE, SHUT, OPEN, 20, EOS]
  said, _ = run(THREE, policy, numbers(min_think=3))
  assert said == [10, 11, 12, CLOSE, SHUT, OPEN, 20, EOS]
  said, _ = run(THREE, policy, numbers(max_think=6, ignores=1))
  assert said[:8] == [10, 11, 12, WAIT, 10, 11, CLOSE, SHUT]  # the end taken back had no room


def test_an_empty_thought_whose_end_shares_a_token_with_its_start():
  """'<think></think>' in byte pairs: one token is '></'."""
  shared = OPEN
  control = dataclasses.replace(
    BUDGET,
    start=((7,), (shared, 8)),
    end=((shared, 9), (SHUT,)),
    end_ids=(9, SHUT),
    final=(9, SHUT, FINAL),
  )
  said, own = run(control, script(7, shared, SHUT, 20, 21, 22, EOS), numbers(max_think=2))
  assert said == [7, shared, SHUT, 20, 21, 22, EOS] and all(own)
  said, _ = run(control, script(7, shared, SHUT, 20, 21, 22, 23), numbers(ignores=1), cap=5)
  assert said[:3] == [7, shared, WAIT]  # what belongs to the start stays


def test_an_end_that_another_control_wrote_stays():
  forced, budget = controls.Force((10, CLOSE)), BUDGET
  policy = lambda said: 20 if len(said) < 4 else EOS
  said, own = run_all((forced, budget), policy, numbers(ignores=2) | {'forced': -1})
  assert said == [10, CLOSE, 20, 20, EOS] and own == [False, False, True, True, True]
  said, _ = run_all((controls.Force((10,)), controls.Force((11, 12))), policy, {'forced': -1})
  assert said[:2] == [10, 12]  # the first that writes has the step


def test_thinking_that_is_forced_to_begin_is_seen():
  budget = dataclasses.replace(BUDGET, start=((OPEN,),))
  policy = lambda said: 10 + len(said)
  given = numbers(max_think=2) | {'forced': 1, 'forbidden': -1}
  all_three = (controls.Force((OPEN, 9)), controls.Forbid((EOS,)), budget)
  said, own = run_all(all_three, policy, given, cap=6)
  assert said == [OPEN, 11, 12, CLOSE, FINAL, 15]
  assert own == [False, True, True, False, False, True]


def plain(policy, max_think, min_think, ignores, wait, final, cap=40):
  """Budget forcing on lists: thinking inside from the start, an end of one token."""
  said, ignored = [], 0
  while len(said) < cap:  # segments of thinking
    if max_think and len(said) >= max_think:
      said += final
      break
    token = policy(said)
    if token not in (CLOSE, EOS):
      said.append(token)
    elif ignored < ignores or len(said) < min_think:
      ignored += 1
      room = max_think - len(said) if max_think else len(wait)
      said += wait[:room]
    else:
      said.append(CLOSE)
      break
  while len(said) < cap and said[-1] != EOS:
    said.append(policy(said))
  return said[:cap]


@pytest.mark.parametrize('seed', range(8))
def test_random_policies_and_budgets(seed):
  rng = np.random.default_rng(seed)
  table = rng.choice([CLOSE, EOS, 10, 11, 12, 13], size=64, p=[0.2, 0.05, 0.2, 0.2, 0.2, 0.15])
  policy = lambda said: int(table[(7 * len(said) + sum(said)) % 64])
  for _ in range(6):
    wait = tuple(rng.choice([WAIT, 30, 31], size=rng.integers(1, 4)).tolist())
    control = dataclasses.replace(BUDGET, wait=wait)
    given = numbers(int(rng.integers(0, 12)), int(rng.integers(0, 6)), int(rng.integers(0, 3)))
    said, _ = run(control, policy, given)
    want = plain(policy, **given, wait=list(wait), final=[CLOSE, FINAL])
    assert said == want, (given, wait)


@pytest.mark.parametrize('name', ['end', 'end_ids', 'final'])
def test_strings_without_tokens(name):
  with pytest.raises(records.UserError, match=f'think_budget: {name} has no tokens'):
    dataclasses.replace(BUDGET, **{name: ()})
  for control in (controls.Force, controls.Forbid):
    with pytest.raises(records.UserError, match='ids has no tokens'):
      control(ids=())


# ------------------------------------------------------------------------------------ stop strings


class Cuts:
  """Texts cut in every way: single letters and pairs of them, and a token that says nothing."""

  pieces = (*'abcx', *(a + b for a in 'abcx' for b in 'abcx'), '', ' a')
  vocab_size = len(pieces)

  def encode(self, text):
    return [self.pieces.index(c) for c in text]

  def decode(self, ids, skip_special):
    assert not skip_special
    return ''.join(self.pieces[i] for i in ids)


@pytest.mark.parametrize('texts', [('aba',), ('abab', 'ba'), ('aab', 'abx', 'x a'), ('c',)])
def test_a_row_stops_where_its_text_first_holds_one(texts):
  """Against a search in the text after each token, over random tokens."""
  tokenizer, rng = Cuts(), np.random.default_rng(0)
  control = controls.StopStrings.of(tokenizer, texts)
  stops, found = jax.jit(control.stops), 0
  # The empty token is left out: see the docstring.
  tokens_BS = rng.choice([i for i in range(tokenizer.vocab_size) if tokenizer.pieces[i]], (200, 12))
  start = 3
  for n in range(start, 12):
    length = jnp.full(200, n)
    got = stops(
      controls.View(jnp.asarray(tokens_BS), length, jnp.full(200, start)), tokens_BS[:, n]
    )
    for b in range(200):
      said = tokenizer.decode(tokens_BS[b, start : n + 1], False)
      before = tokenizer.decode(tokens_BS[b, start:n], False)
      if any(text in before for text in texts):
        continue  # it has stopped
      want = any(text in said for text in texts)
      assert bool(got[b]) == want, (said, texts)
      found += want
  assert found > 20


def test_stop_strings_of_a_config():
  tokenizer = tokenizers.Bytes()
  (control,), given = controls.build(section('stop_strings', texts=('ab', 'b!')), tokenizer)
  assert (
    given == {} and control.longest == 2 and hash(control) == hash(dataclasses.replace(control))
  )
  for texts in ('ab', (), ('a', '')):
    with pytest.raises(records.UserError, match='must be a tuple of strings, none of them empty'):
      controls.build(section('stop_strings', texts=texts), tokenizer)


# ------------------------------------------------------------------------------------ in the graph


def make_sampler(**changes):
  fields = {**common.model('nano').to_dict(), 'vocab_size': 8, 'num_layers': 1, 'width': 16}
  fields |= {'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 8, 'mlp_width': 16}
  names = [f.name for f in dataclasses.fields(decoder.Decoder)]
  model = decoder.Decoder(**{name: fields[name] for name in names})
  how = {**common.sampler(), 'buckets': 1, **changes}  # fewer programs to compile
  return sampling.Sampler(model, sharding.make_mesh(1, 1, 1), (), **how)


@pytest.fixture(scope='module')
def sampler():
  return make_sampler()


@pytest.fixture(scope='module')
def in_pieces():
  """A cache that grows and is tidied, and rows that move together."""
  return make_sampler(segment=8, buckets=2)


@pytest.fixture(scope='module')
def params(sampler):
  return jax.tree.map(lambda x: 3.0 * x, sampler.model.init(jax.random.key(0)))


def generate(sampler, params, control, given, rows=24, new=20, temperature=1.0, slots=0, **more):
  requests = types.Requests(
    tokens_PT=np.array([[6, 7, 0], [5, 6, 7]], np.int32),
    length_P=np.array([2, 3], np.int32),
    prompt_R=np.arange(rows, dtype=np.int32) % 2,
    key_R=sampling.row_keys(0, 'train', 0, 0, 0, 0, np.arange(rows), 0),
    max_new_R=np.full(rows, new, np.int32),
    numbers={name: np.broadcast_to(np.int32(v), rows) for name, v in given.items()},
    temperature_R=None,
  )
  requests = dataclasses.replace(requests, **more)
  spec = types.Spec(temperature, 0, 1.0, 0.0, 0, (EOS,), control)
  return sampler.generate(params, requests, spec, slots, lambda: None)


def rows_of(out):
  for r in range(out.length_R.size):
    at = slice(out.prompt_length_R[r], out.length_R[r])
    yield out.tokens_RS[r, at].tolist(), out.source_RS[r, at], out.logp_RS[r, at]
    rest = out.source_RS[r, out.length_R[r] :]
    assert not rest.any() and not out.logp_RS[r, out.length_R[r] :].any()


THREE_IN_8 = dataclasses.replace(
  BUDGET,
  end=((CLOSE,), (SHUT, 6), (OPEN, 7)),
  end_ids=(CLOSE, SHUT, OPEN),
  final=(CLOSE, SHUT, OPEN, FINAL),
)
PAIR = dataclasses.replace(
  BUDGET, end=((CLOSE,), (SHUT,)), end_ids=(CLOSE, SHUT), final=(CLOSE, SHUT, FINAL)
)


@pytest.mark.parametrize(
  'control, how',
  [(BUDGET, 'sampler'), (PAIR, 'sampler'), (THREE_IN_8, 'sampler'), (THREE_IN_8, 'in_pieces')],
)
def test_log_probabilities_are_those_of_the_text_as_it_stands(request, params, control, how):
  """Also behind what was written and what was taken back: the cache holds what the row holds."""
  sampler = request.getfixturevalue(how)
  out = generate(sampler, params, (control,), numbers(max_think=9, ignores=2))
  found = 0
  for r, (said, source, logp) in enumerate(rows_of(out)):
    start, n = int(out.prompt_length_R[r]), int(out.length_R[r])
    tokens = jnp.asarray(out.tokens_RS[r : r + 1, :n])
    at = jnp.arange(n)[None]
    hidden, _ = sampler.model.hidden(params, tokens, at, jnp.ones_like(at), None)
    z = hidden[0] @ sampler.model.head(params).T * sampler.model.logit_scale
    want = jax.nn.log_softmax(z, -1)[jnp.arange(n - 1), tokens[0, 1:]][start - 1 :]
    drawn = source == types.POLICY
    np.testing.assert_allclose(logp[drawn], np.asarray(want)[drawn], atol=1e-4)
    assert not logp[~drawn].any()
    found += (~drawn).sum()
    think = said.index(FINAL) - len(control.final) + 1 if FINAL in said else None
    assert think is None or think <= 9 or FINAL in said[:think]
  assert found > 24  # every row was forced at some time


def test_rows_of_a_batch_have_their_own_numbers(sampler, params):
  each = numbers(np.arange(24) % 5 + 1)
  together = list(rows_of(generate(sampler, params, (BUDGET,), each)))
  waves = list(rows_of(generate(sampler, params, (BUDGET,), each, slots=7)))
  for (a, _, _), (b, _, _) in zip(together, waves, strict=True):
    assert a == b
  for r, (said, source, _) in enumerate(together):
    limit = r % 5 + 1
    written = np.flatnonzero(source == types.ENVIRONMENT)
    if CLOSE in said[:limit] or EOS in said[:limit]:
      continue
    assert said[limit : limit + 2] == [CLOSE, FINAL] and written.tolist() == [limit, limit + 1]


def test_decoding_in_pieces_is_decoding_at_once(sampler, params):
  """Rows that have stopped keep the state of their controls; `assign` begins anew."""
  given = numbers(max_think=9, ignores=1)
  whole = generate(sampler, params, (THREE_IN_8,), given)
  rows, spec = 24, types.Spec(1.0, 0, 1.0, 0.0, 0, (EOS,), (THREE_IN_8,))
  prompt = jnp.asarray(np.array([[6, 7, 0], [5, 6, 7]], np.int32)[np.arange(rows) % 2])
  length = jnp.asarray(np.array([2, 3], np.int32)[np.arange(rows) % 2])
  key = sampling.row_keys(0, 'train', 0, 0, 0, 0, np.arange(rows), 0)
  each = {name: np.full(rows, n, np.int32) for name, n in given.items()}
  state = sampler.prefill(params, prompt, length, 23)
  state = sampler.assign(state, jnp.asarray(key), jnp.full(rows, 20), each)
  for n in range(20):
    state = sampler.decode(params, state, spec, 1)
    if n == 7:
      state = sampler.fork(state, jnp.arange(rows))
  with pytest.raises(ValueError, match='are those of its first decode'):
    sampler.decode(params, state, dataclasses.replace(spec, controls=()), 1)
  with pytest.raises(ValueError, match='would not see the new tokens'):
    sampler.append(params, state, jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32))
  want = list(rows_of(whole))
  tokens, ends = np.asarray(state.tokens_BS), np.asarray(state.length_B)
  for r in range(rows):
    assert tokens[r, int(length[r]) : ends[r]].tolist() == want[r][0]
  again = sampler.assign(state, jnp.asarray(key), jnp.full(rows, 1), each)
  assert again.controls is None


def test_what_a_control_writes_needs_no_kept_ids(sampler, params):
  """Nothing was drawn at its positions, so nothing has to be remembered there."""
  requests = types.Requests(
    tokens_PT=np.array([[6, 7]], np.int32),
    length_P=np.array([2], np.int32),
    prompt_R=np.zeros(4, np.int32),
    key_R=sampling.row_keys(0, 'train', 0, 0, 0, 0, np.arange(4), 0),
    max_new_R=np.full(4, 3, np.int32),
    numbers={'forced': np.full(4, -1, np.int32)},
    temperature_R=None,
  )
  spec = types.Spec(1.0, 0, 0.999, 0.0, 1, (EOS,), (controls.Force((3, EOS, 3)),))
  out = sampler.generate(params, requests, spec, 0, lambda: None)
  assert (out.tokens_RS[:, 2:5] == [3, EOS, 3]).all()  # a stop id that was written stops nothing
  assert (out.kept_RSK[:, 2:5] == -1).all() and (out.length_R == 5).all()


def test_force_and_forbid(sampler, params):
  force, forbid = controls.Force((3, 5, 3)), controls.Forbid((EOS, CLOSE))
  given = {'forced': np.arange(24) % 4, 'forbidden': 8}
  for r, (said, source, _) in enumerate(rows_of(generate(sampler, params, (force, forbid), given))):
    n = r % 4
    assert said[:n] == [3, 5, 3][:n] and (source[:n] == types.ENVIRONMENT).all()
    assert (source[n:] == types.POLICY).all() and not {EOS, CLOSE} & set(said[:8])
  never = generate(sampler, params, (forbid,), {'forbidden': -1})
  assert not any({EOS, CLOSE} & set(said) for said, _, _ in rows_of(never))
  free = generate(sampler, params, (), {})
  assert any({EOS, CLOSE} & set(said[:8]) for said, _, _ in rows_of(free))


# ------------------------------------------------------------------------------------ mixtures


@dataclasses.dataclass(frozen=True)
class Soft(controls.Control):
  """Feeds the mixture of the `most` likeliest embeddings, to rows whose number says so."""

  MIXES = True
  NUMBERS = ('soft',)
  most: int

  def mix(self, state, numbers, view, drawn, token_B):
    weight_BK, id_BK = jax.lax.top_k(drawn.weight_BV, self.most)
    return numbers['soft'] > 0, weight_BK / weight_BK.sum(-1, keepdims=True), id_BK


def test_a_mixture_of_one_is_its_token(sampler, params):
  plain = generate(sampler, params, (), {}, temperature=0.0)
  mixed = generate(sampler, params, (Soft(1),), {'soft': 1}, temperature=0.0)
  np.testing.assert_array_equal(mixed.tokens_RS, plain.tokens_RS)
  np.testing.assert_allclose(mixed.logp_RS, plain.logp_RS, atol=1e-5)


@pytest.mark.parametrize('slots', [0, 5])
def test_mixed_embeddings_are_what_the_model_reads(sampler, params, slots):
  """Every row against a forward pass over the embeddings that its draws say."""
  soft = np.arange(24) % 3 > 0
  new = np.arange(24) % 7 + 6
  more = {'max_new_R': new.astype(np.int32)}
  out = generate(sampler, params, (Soft(3),), {'soft': soft}, slots=slots, **more)
  model, differs = sampler.model, 0
  for r in range(24):
    start, end = int(out.prompt_length_R[r]), int(out.length_R[r])
    x = np.array(model.embed(params, jnp.asarray(out.tokens_RS[r, :end])))[None]
    at = jnp.arange(end)[None]
    for t in range(start, end):
      hidden, _ = model.hidden(params, jnp.asarray(x), at, jnp.ones_like(at), None)
      logp = jax.nn.log_softmax(hidden[0, t - 1] @ model.head(params).T * model.logit_scale)
      assert out.logp_RS[r, t] == pytest.approx(float(logp[out.tokens_RS[r, t]]), abs=1e-4)
      if soft[r]:
        weight, ids = jax.lax.top_k(jnp.exp(logp), 3)
        mixture = (weight / weight.sum()) @ model.embed(params, ids)
        differs += np.abs(x[0, t] - mixture).max() > 0.1
        x[0, t] = mixture
  assert differs > 50


@dataclasses.dataclass(frozen=True)
class Replaces(controls.Control):
  """In the third step of a completion 6 takes the place of the last token."""

  def step(self, state, numbers, view, made, stop_ids):
    last_B = jnp.take_along_axis(view.tokens_BS, view.length_B[:, None] - 1, axis=1)[:, 0]
    third_B = (view.length_B - view.start_B == 2) & (last_B == 4)
    token_B = jnp.where(third_B, 6, made.token_B)
    return state, controls.Step(token_B, made.back_B + third_B, made.written_B | third_B)


def test_a_text_is_what_stands_without_what_was_taken_back(sampler, params):
  """5 and 4 are forced, 6 replaces the 4, and 5 6 ends the row."""
  moves = np.asarray([[0] * 5 + [1, 0, 0], [0] * 5 + [1, 2, 0], [2] * 8], np.int16)
  stop = controls.StopStrings(3, 2, moves.tobytes())
  applied = (controls.Force((5, 4)), Replaces(), stop)
  for said, _, _ in rows_of(generate(sampler, params, applied, {'forced': -1}, rows=4)):
    assert said == [5, 6]


def test_controls_mixtures_and_temperatures_by_row_in_any_layout(sampler, in_pieces, params):
  """Budgets, a stop text, a mixture and temperatures together: all at once, and by few rows."""
  stop = controls.StopStrings(
    3, 2, np.asarray([[0] * 5 + [1, 0, 0], [0] * 6 + [2, 0], [2] * 8], np.int16).tobytes()
  )
  given = numbers(np.arange(24) % 5 + 2, 0, np.arange(24) % 2) | {'soft': np.arange(24) % 2}
  temperature = np.asarray([0.0, 0.5, 1.0, 2.0], np.float32)[np.arange(24) % 4]
  run = lambda sampler, slots: generate(
    sampler, params, (BUDGET, stop, Soft(2)), given, slots=slots, temperature_R=temperature
  )
  whole = run(sampler, 0)
  said = list(rows_of(whole))
  assert len({len(ids) for ids, _, _ in said}) > 4
  ends = [ids for ids, _, _ in said if ids[-2:] == [5, 6]]
  assert ends and all((5, 6) not in zip(ids[:-1], ids[1:-1], strict=False) for ids, _, _ in said)
  for slots in (0, 8):
    other = run(in_pieces, slots)
    for name in ('tokens_RS', 'length_R', 'stop_R', 'source_RS'):
      np.testing.assert_array_equal(getattr(other, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(other.logp_RS, whole.logp_RS, atol=1e-4)
