"""One prompt, one completion: what is asked of the sampler, and what becomes of its answer."""

import dataclasses

import numpy as np
import pytest

from reasonrl import records, tokenizers, types
from reasonrl.configs import common
from reasonrl.envs import single_turn

BYTES = tokenizers.Bytes()


def environment(**changes):
  fields = common.single_turn().to_dict()
  fields.pop('name')
  return single_turn.SingleTurn(**(fields | {'max_completion_length': 4, **changes}))


class Tools:
  """Two problems; every completion says 'ab' and stops, by EOS or 'c', or runs into its cap."""

  tokenizer, prefill = BYTES, '<think>'

  def __init__(self, stops):
    self.stops, self.asked = stops, None

  def examples(self):
    return [records.Example('t', 'train', i, p, 'a', None, {}) for i, p in ((7, 'x'), (3, 'yy'))]

  def render(self, example):
    return BYTES.encode(example.problem)

  def row_keys(self, step, prompt_R, sample_R, thread_R):
    self.keys = (step, prompt_R.tolist(), sample_R.tolist(), thread_R)
    return np.zeros((prompt_R.size, 2), np.uint32)

  def generate(self, params, requests, spec, slots):
    self.asked = (params, requests, spec, slots)
    said = [*BYTES.encode('ab'), BYTES.eos_ids[0] if self.stops == 'eos' else BYTES.encode('c')[0]]
    R, width = requests.prompt_R.size, requests.tokens_PT.shape[1] + 4
    tokens, source = np.zeros((R, width), np.int32), np.zeros((R, width), np.int8)
    start = requests.length_P[requests.prompt_R]
    for r in range(R):
      prompt = requests.prompt_R[r]
      tokens[r, : start[r]] = requests.tokens_PT[prompt, : start[r]]
      tokens[r, start[r] : start[r] + 3], source[r, start[r] : start[r] + 3] = said, types.POLICY
    stop = np.full(R, records.Stop.EOS if self.stops else records.Stop.LENGTH)
    kept = tokens[..., None] * (source == types.POLICY)[..., None] if spec.truncates else None
    zeros = np.zeros((R, width))
    return types.Samples(tokens, start, start + 3, source, zeros, zeros, zeros, stop, kept)

  def reward(self, state, experience):
    return dataclasses.replace(experience, reward_R=np.arange(4, dtype=np.float32))


@pytest.mark.parametrize('stops', ['eos', 'string', ''])
def test_rollout(stops):
  tools = Tools(stops)
  env = environment(num_generations=2, temperature=0.5, slots=3)
  found = env.rollout(tools, {'params': 'weights', 'version': 9}, step=5)
  params, requests, spec, slots = tools.asked
  assert (params, slots, spec) == (
    'weights',
    3,
    types.Spec(0.5, 0, 1.0, 0.0, 64, BYTES.eos_ids, ()),
  )
  assert requests.prompt_R.tolist() == [0, 0, 1, 1] and requests.length_P.tolist() == [1, 2]
  assert requests.max_new_R.tolist() == [4] * 4
  # A key depends on the example's own index and the sample, not on the place in the batch.
  assert tools.keys == (5, [7, 7, 3, 3], [0, 1, 0, 1], 0)
  assert found.group_B.tolist() == found.group_R.tolist() == [0, 0, 1, 1]
  assert found.rollout_B.tolist() == [0, 1, 2, 3] and set(found.version_B) == {9}
  assert found.reward_R.tolist() == [0, 1, 2, 3]  # what the tool made of it
  assert found.support == {}
  assert found.mask_BT.sum(1).tolist() == [3] * 4  # EOS included
  said = found.completions[3]
  assert said.text == '<think>ab' + ('' if stops == 'eos' else 'c')  # EOS is no part of it
  assert said.stop == (records.Stop.EOS if stops else records.Stop.LENGTH)
  assert (said.num_tokens, said.cap, said.think) == (3, 4, None)
  assert [example.index for example in found.examples] == [7, 7, 3, 3]


def test_truncated_rollout():
  tools, how = Tools('eos'), {'top_k': 2, 'top_p': 0.9, 'min_p': 0.1, 'max_kept_tokens': 7}
  found = environment(num_generations=2, **how).rollout(tools, {'params': 0, 'version': 9}, step=5)
  spec = tools.asked[2]
  assert {name: getattr(spec, name) for name in how} == how and spec.truncates
  np.testing.assert_array_equal(found.support['kept'][..., 0], found.tokens_BT * found.mask_BT)
