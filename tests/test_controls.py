"""Sampler controls: by hand, against a plain Python decoder, and inside the sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reasonrl import controls, records, sampling, sharding, tokenizers, types
from reasonrl.configs import common
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
  tokens_BS, start_B = jnp.full((1, start + cap), 99, jnp.int32), jnp.full(1, start, jnp.int32)
  numbers = {name: jnp.full(1, value, jnp.int32) for name, value in numbers.items()}
  state, said, own = control.begin(controls.View(tokens_BS, start_B, start_B)), [], []
  while len(said) < cap:
    view = controls.View(tokens_BS, start_B + len(said), start_B)
    made = controls.Step(jnp.full(1, policy(said)), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool))
    state, made = control.step(state, numbers, view, made, jnp.asarray([EOS]))
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
    assert (control.begin(view)['phase_B'][0] == controls.THINKING) == cut
  both = dataclasses.replace(BUDGET, start=((7,), (OPEN,)))
  assert both.begin(view)['phase_B'][0] == controls.BEFORE
  view = view._replace(tokens_BS=view.tokens_BS.at[0, 1].set(OPEN))
  assert both.begin(view)['phase_B'][0] == controls.THINKING


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
  assert budget.wait == tuple(tokenizer.encode('Wait'))
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

  pieces = ('</', 'think', '>', '><', '.</', 'x', '>\n', 'thinking')
  vocab_size = len(pieces)

  def encode(self, text):
    pieces = {'</think>': ('</', 'think', '>'), 'x': ('x',)}[text]
    return [self.pieces.index(piece) for piece in pieces]

  def decode(self, ids, skip_special):
    return ''.join(self.pieces[i] for i in ids)


def test_a_string_joined_to_what_is_beside_it():
  assert controls.pattern(Pairs(), '</think>') == ((0, 4), (1,), (2, 3, 6))
  assert controls.pattern(Pairs(), 'x') == ((5,),)


@pytest.mark.parametrize(
  'sections, message',
  [
    ({'brake': {}}, "controls: 'brake' is not one of think_budget, force, forbid"),
    ({'force': {'text': 'a'}}, 'controls.force: unknown or missing: forced'),
    (section('force', text='a', forced=1.5), 'forced=1.5 is not a number of tokens'),
    (section('force'), 'force: ids has no tokens'),
    (section('think_budget', end=''), 'think_budget: end has no tokens'),
    (section('think_budget', wait='', ignores=1), "wait='', but ignores and min_think write it"),
  ],
)
def test_bad_sections(sections, message):
  with pytest.raises(records.UserError, match=message):
    controls.build(sections, tokenizers.Bytes())


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


# ------------------------------------------------------------------------------------ in the graph


@pytest.fixture(scope='module')
def sampler():
  fields = {**common.model('nano').to_dict(), 'vocab_size': 8, 'num_layers': 1, 'width': 16}
  fields |= {'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 8, 'mlp_width': 16}
  names = [f.name for f in dataclasses.fields(decoder.Decoder)]
  model = decoder.Decoder(**{name: fields[name] for name in names})
  return sampling.Sampler(model, sharding.make_mesh(1, 1, 1), ())


@pytest.fixture(scope='module')
def params(sampler):
  return jax.tree.map(lambda x: 3.0 * x, sampler.model.init(jax.random.key(0)))


def generate(sampler, params, control, given, rows=24, new=20, temperature=1.0, slots=0):
  requests = types.Requests(
    tokens_PT=np.array([[6, 7, 0], [5, 6, 7]], np.int32),
    length_P=np.array([2, 3], np.int32),
    prompt_R=np.arange(rows, dtype=np.int32) % 2,
    key_R=sampling.row_keys(0, 'train', 0, 0, 0, 0, np.arange(rows), 0),
    max_new_R=np.full(rows, new, np.int32),
    numbers={name: np.broadcast_to(np.int32(v), rows) for name, v in given.items()},
  )
  spec = types.Spec(temperature, 0, 1.0, 0.0, 0, (EOS,), control)
  return sampler.generate(params, requests, spec, slots, lambda: None)


def rows_of(out):
  for r in range(out.length_R.size):
    at = slice(out.prompt_length_R[r], out.length_R[r])
    yield out.tokens_RS[r, at].tolist(), out.source_RS[r, at], out.logp_RS[r, at]
    rest = out.source_RS[r, out.length_R[r] :]
    assert not rest.any() and not out.logp_RS[r, out.length_R[r] :].any()


PAIR = dataclasses.replace(
  BUDGET, end=((CLOSE,), (SHUT,)), end_ids=(CLOSE, SHUT), final=(CLOSE, SHUT, FINAL)
)


@pytest.mark.parametrize('control', [BUDGET, PAIR])
def test_log_probabilities_are_those_of_the_text_as_it_stands(sampler, params, control):
  """Also behind what was written and what was taken back: the cache holds what the row holds."""
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


def test_force_and_forbid(sampler, params):
  force, forbid = controls.Force((3, 5, 3)), controls.Forbid((EOS, CLOSE))
  given = {'forced': np.arange(24) % 4, 'forbidden': 8}
  for r, (said, source, _) in enumerate(rows_of(generate(sampler, params, (force, forbid), given))):
    n = r % 4
    assert said[:n] == [3, 5, 3][:n] and (source[:n] == types.ENVIRONMENT).all()
    assert (source[n:] == types.POLICY).all() and not {EOS, CLOSE} & set(said[:8])
  free = generate(sampler, params, (), {})
  assert any({EOS, CLOSE} & set(said[:8]) for said, _, _ in rows_of(free))
