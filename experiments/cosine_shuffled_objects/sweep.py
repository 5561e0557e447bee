"""The cosine reward beside the classic one in a window of 32 tokens, and a reward for length.

  python experiments/sweep.py --config=configs/cosine.py --to=runs/cosine \
    --sweep=experiments/cosine_shuffled_objects/sweep.py --max_parallel=2

The bases come first in the list, the arms of a seed after those of the seed before: an arm copies
the base of its seed, which must have ended.
"""

RUNS = 'runs/cosine'


def sweep(add):
  for seed in range(3):
    add(name=f'base-{seed}', config='configs/cosine.py', seed=seed, phases=('pretrain',))
  for seed in range(3):
    for variant in ('', ':classic', ':variant_a'):
      base = f'{RUNS}/base-{seed}'
      start = {'pretrain.steps': 0, 'pretrain.init': f'{base}/phases/pretrain'}
      start |= {'tokenizer.kind': 'saved', 'tokenizer.path': f'{base}/tokenizer'}
      name = variant.removeprefix(':') or 'cosine'
      add(name=f'{name}-{seed}', config=f'configs/cosine.py{variant}', seed=seed, **start)
