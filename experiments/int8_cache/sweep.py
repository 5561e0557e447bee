"""GRPO with keys and values in int8, corrected and not, beside float32: three seeds each.

  python experiments/sweep.py --config=configs/r1_zero.py --to=runs/int8_cache \
    --sweep=experiments/int8_cache/sweep.py --max_parallel=2
"""

FORMS = {
  'float32': {},
  'int8': {'sampler.cache_dtype': 'int8'},
  'int8_corrected': {
    'sampler.cache_dtype': 'int8',
    'rl.algorithm.importance_correction': 'token_truncate',
  },
}


def sweep(add):
  for name, fields in FORMS.items():
    for seed in range(3):
      add(name=f'{name}-{seed}', seed=seed, **fields)
