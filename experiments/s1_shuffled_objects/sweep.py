"""Budget forcing on shuffled objects: three bases, and on each two models trained to be asked.

  python experiments/sweep.py --config=configs/s1.py --to=runs/s1 \
    --sweep=experiments/s1_shuffled_objects/sweep.py --max_parallel=2
"""

RUNS = 'runs/s1'


def sweep(add):
  for seed in range(3):
    add(name=f'base-{seed}', config='configs/s1.py', seed=seed)
  for arm in ('token', 'step'):
    for seed in range(3):
      add(name=f'{arm}-{seed}', config=f'configs/s1.py:{arm}', seed=seed)
