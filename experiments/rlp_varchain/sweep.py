"""RLP on VarChain: bases, arms that start from them, and SFT with GRPO on top of three of these.

  python experiments/sweep.py --config=configs/rlp.py --to=runs/rlp \
    --sweep=experiments/rlp_varchain/sweep.py --max_parallel=2

A run that starts from another comes behind it in the list, late enough for two at a time.
"""

RUNS = 'runs/rlp'
ARMS = ('rlp', 'cpt', 'ntp', 'uniform', 'rpt', 'other', 'short')


def sweep(add):
  def on(start, seed, phase):
    """Fields of a run whose first phase starts where that one ended."""
    tokenizer = {'tokenizer.kind': 'saved', 'tokenizer.path': f'{RUNS}/base-{seed}/tokenizer'}
    return {f'{phase}.init': f'{RUNS}/{start}-{seed}/phases/{last(start)}', **tokenizer}

  def last(name):
    return {'base': 'pretrain', 'cpt': 'cpt'}.get(name, 'rlp')

  tiny = 'configs/rlp.py'
  for seed in range(3):
    add(name=f'base-{seed}', config=tiny, seed=seed, phases=('pretrain',))
  for seed in range(3):
    for arm in ARMS:
      config = tiny if arm == 'rlp' else f'{tiny}:{arm}'
      add(
        name=f'{arm}-{seed}',
        config=config,
        seed=seed,
        phases=(last(arm),),
        **on('base', seed, last(arm)),
      )
  for seed in range(3):
    # What is learned, but with the thought about another text in its place.
    fields = {'evaluation.env.thoughts': 'other', 'phases': ('pretrain',), 'pretrain.steps': 0}
    add(name=f'swapped-{seed}', config=tiny, seed=seed, **fields, **on('rlp', seed, 'pretrain'))
    for start in ('base', 'cpt', 'rlp'):
      more = {'config': f'{tiny}:posttrain', 'seed': seed}
      add(name=f'post_{start}-{seed}', **more, **on(start, seed, 'sft'))
