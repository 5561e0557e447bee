"""The same run with other seeds, and with the smallest group that GRPO can compare."""


def sweep(add):
  for seed in range(3):
    add(name=f'seed{seed}', seed=seed)
    add(name=f'seed{seed}_pairs', **{'seed': seed, 'rl.env.num_generations': 2})
