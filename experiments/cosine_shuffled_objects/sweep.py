"""The cosine reward beside the classic one in a window of 32 tokens, and a reward for length.

  python experiments/sweep.py --config=configs/cosine.py --to=runs/cosine \
    --sweep=experiments/cosine_shuffled_objects/sweep.py --max_parallel=2
"""


def sweep(add):
  for variant in ('', ':classic', ':variant_a'):
    for seed in range(3):
      name = variant.removeprefix(':') or 'cosine'
      add(name=f'{name}-{seed}', config=f'configs/cosine.py{variant}', seed=seed)
