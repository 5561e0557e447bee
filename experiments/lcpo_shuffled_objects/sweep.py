"""LCPO on shuffled objects: three seeds of all phases, and what they are compared with.

  python experiments/sweep.py --config=configs/lcpo.py --to=runs/lcpo \
    --sweep=experiments/lcpo_shuffled_objects/sweep.py --max_parallel=2

The full runs come first in the list; an arm starts from the phases that the run of its seed kept.
"""

RUNS = 'runs/lcpo'


def kept(seed, phase):
  """A phase that is not run again but taken from the full run."""
  return {f'{phase}.steps': 0, f'{phase}.init': f'{RUNS}/lcpo-{seed}/phases/{phase}'}


def sweep(add):
  for seed in range(3):
    add(name=f'lcpo-{seed}', config='configs/lcpo.py', seed=seed)
  for seed in range(3):
    same = {'tokenizer.kind': 'saved', 'tokenizer.path': f'{RUNS}/lcpo-{seed}/tokenizer'}
    base = {'seed': seed, **same, **kept(seed, 'pretrain')}
    # cut off by budget forcing, without any target in its prompt
    add(name=f'base-{seed}', config='configs/lcpo.py:base', **base)
    # without the labelled samples
    add(name=f'cold-{seed}', config='configs/lcpo.py:cold', **base)
    # LCPO-Max with a sum in place of the product
    exact = {'seed': seed, **same, **kept(seed, 'exact'), 'phases': ('exact', 'max')}
    add(name=f'additive-{seed}', config='configs/lcpo.py:additive', **exact)
