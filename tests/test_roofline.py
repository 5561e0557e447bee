"""The roofline of the sampler's benchmarks, by hand."""

import importlib.util
import pathlib

import pytest

from reasonrl.configs import common
from reasonrl.models import decoder

PATH = pathlib.Path(__file__).parents[1] / 'experiments/bench/sampler/roofline.py'


@pytest.mark.parametrize(
  'cache, bandwidth, rate, seconds',
  [
    # One step: 44 weights and 4 cached tokens of 2 x 2 values, 2 bytes each.
    ('bfloat16', 1.0, 1e12, 88 + 4 * 8),
    # 2 values and a scale of 4 bytes.
    ('int8', 1.0, 1e12, 88 + 4 * 12),
    # 2 (2 x 34 + 10) for the prompt; 2 x 44 for each of two rows, 4 x 2 for each of its 3 keys.
    ('bfloat16', 1e12, 1.0, 156 + 2 * (88 + 3 * 8)),
  ],
)
def test_the_time_of_two_tokens(cache, bandwidth, rate, seconds):
  """Two rows of one prompt of two tokens: the prompt, and one step."""
  spec = importlib.util.spec_from_file_location('roofline', PATH)
  roofline = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(roofline)
  config = common.model('nano').to_dict() | {
    **{'vocab_size': 5, 'num_layers': 1, 'width': 2, 'num_heads': 1, 'num_kv_heads': 1},
    **{'head_dim': 2, 'mlp_width': 3},
  }
  model = decoder.Decoder(**{k: v for k, v in config.items() if k not in ('kind', 'weights')})
  rates = {'bandwidth': bandwidth, 'bfloat16': rate}
  found = roofline.floor(model, 1, 2, 2, 2, 'bfloat16', cache, rates)
  assert found == pytest.approx(seconds, rel=1e-6)
