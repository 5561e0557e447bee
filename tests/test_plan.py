"""Which requests a program serves: every one once, beside its prompt, in no more rows."""

import numpy as np
import pytest

from reasonrl import types
from reasonrl.sampling import plan


def ask(prompt_R, longest=4):
  prompt_R = np.asarray(prompt_R, np.int32)
  P, R = prompt_R.max() + 1, prompt_R.size
  return types.Requests(
    tokens_PT=np.arange(P)[:, None] * 100 + np.arange(longest, dtype=np.int32),
    length_P=np.arange(P, dtype=np.int32) % longest + 1,
    prompt_R=prompt_R,
    key_R=np.stack([np.arange(R), np.arange(R)], axis=1).astype(np.uint32),
    max_new_R=np.arange(R, dtype=np.int32) + 1,
    numbers={'n': np.arange(R, dtype=np.int32)},
    temperature_R=None,
  )


GROUPS = np.random.default_rng(0).permutation(np.repeat(np.arange(9), 6))
UNEVEN = np.random.default_rng(0).integers(0, 30, 70)


@pytest.mark.parametrize('devices', [1, 2, 4])
@pytest.mark.parametrize('slots', [0, 5, 16, 54, 100])
@pytest.mark.parametrize('window', [5, 12, 64])
@pytest.mark.parametrize('prompt_R', [GROUPS, UNEVEN, [3]], ids=['groups', 'uneven', 'one'])
def test_every_request_once(prompt_R, slots, devices, window):
  requests, seen = ask(prompt_R), []
  R = requests.prompt_R.size
  for arrays, request, rows, width, ordered in plan.waves(requests, slots, devices, 4, window):
    per, P = request.size // devices, arrays.length_P.size // devices
    assert rows <= per and rows % width == per % width == 0
    # What the axis of rows is rounded up to: one group on each device.
    assert not slots or rows * devices <= max(slots, -(-R // devices) * devices) + width * devices
    assert arrays.tokens_PT.shape == (devices * P, 4)
    for place, r in enumerate(request):
      d = place // per
      prompt = d * P + arrays.prompt_R[place]
      if r == R:
        assert arrays.max_new_R[place] == 0
        continue
      seen.append(r)
      want = requests.prompt_R[r]
      assert arrays.tokens_PT[prompt].tolist() == requests.tokens_PT[want].tolist()
      assert arrays.length_P[prompt] == requests.length_P[want]
      assert arrays.key_R[place].tolist() == [r, r] and arrays.max_new_R[place] == r + 1
      assert arrays.numbers['n'][place] == r
      assert requests.prompt_R[r] == requests.prompt_R[request[place - place % width]]
      if ordered and rows == per:
        assert arrays.prompt_R[place] == place % per // width
  assert sorted(seen) == list(range(R))


def test_widths():
  """What divides the samples of every prompt, and leaves the fewest rows idle."""
  width = lambda prompt_R, devices: next(plan.waves(ask(prompt_R), 0, devices, 4, 64)).width
  assert width(GROUPS, 1) == 6
  assert width(UNEVEN, 1) == 1
  assert width(np.repeat(np.arange(2), 6), 4) == 3  # two groups are too few for four devices
  assert width(np.repeat(np.arange(8), 6), 4) == 6
  # With few rows: replaced one by one, but together where the prompt is most of the row.
  few = lambda window: next(plan.waves(ask(GROUPS), 12, 1, 4, window))
  assert few(64).width == 1 and few(64).rows == 12 and few(6).width == 6


def test_prompts_take_about_as_much_memory_as_rows():
  """200 prompts and 4 rows of 12 tokens: 12 prompts of 4 at a time."""
  found = list(plan.waves(ask(np.arange(200)), 4, 1, 4, 12))
  assert [wave.arrays.length_P.size for wave in found] == [12] * 16 + [8]
  assert next(plan.waves(ask(np.arange(200)), 4, 1, 4, 4000)).arrays.length_P.size >= 200
