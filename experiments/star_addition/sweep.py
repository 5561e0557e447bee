"""STaR on addition: three seeds of every arm, each from the base of its seed.

  python experiments/sweep.py --config=configs/star.py --to=runs/star_addition \
    --sweep=experiments/star_addition/sweep.py --max_parallel=2

The bases come first in the list; an arm copies its base (a phase of no steps) and goes on.
"""

RUNS = 'runs/star_addition'
ITERATIONS = 5
LOOP = ('pretrain', ('collect', 'sft', ITERATIONS))
BASES = {'base': 'configs/star.py', 'pseudo_base': 'configs/star.py:pseudo'}
ARMS = {  # name -> base, config, changes
  'rationalize': ('base', 'configs/star.py', {'phases': LOOP}),
  'plain': ('base', 'configs/star.py:plain', {'phases': LOOP}),
  # as many steps on the corpus of the base alone
  'control': ('base', 'configs/star.py:control', {'phases': ('pretrain', ('sft', ITERATIONS))}),
  # a base that has seen hints with scratchpads of random digits
  'pseudo': ('pseudo_base', 'configs/star.py:pseudo', {'phases': LOOP}),
  # about as many sampled tokens as `rationalize`
  'grpo': ('base', 'configs/star.py:grpo', {}),
  # every iteration from the last one on
  'continue': ('base', 'configs/star.py', {'phases': LOOP, 'sft.init': 'previous'}),
  # samples at temperature .7 instead of rationalisation
  'hot': ('base', 'configs/star.py:plain', {'phases': LOOP, 'collect.env.temperature': 0.7}),
}


def sweep(add):
  for name, config in BASES.items():
    for seed in range(3):
      add(name=f'{name}-{seed}', config=config, seed=seed, phases=('pretrain',))
  for name, (base, config, changes) in ARMS.items():
    for seed in range(3):
      start = {
        'pretrain.steps': 0,
        'pretrain.init': f'{RUNS}/{base}-{seed}/phases/pretrain',
        'tokenizer.kind': 'saved',
        'tokenizer.path': f'{RUNS}/{base}-{seed}/tokenizer',
      }
      add(name=f'{name}-{seed}', config=config, seed=seed, **start, **changes)
