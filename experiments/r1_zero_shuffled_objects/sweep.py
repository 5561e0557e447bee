"""Three seeds of the tiny run and of its controls, at equal sampled completions per step.

  python experiments/sweep.py --config=configs/r1_zero.py --to=runs/r1_zero_shuffled_objects \
    --sweep=experiments/r1_zero_shuffled_objects/sweep.py --max_parallel=2
"""

# Held-out problems are answered 16 times each: pass@k, and a vote.
EVALUATION = {'evaluation.env.num_generations': 16, 'evaluation.env.slots': 512}
VARIANTS = {
  'grpo': {},
  'shuffled_rewards': {'rl.shuffle_rewards': True},
  'format_only': {'rewards.accuracy.weight': 0.0},
  'g2': {'rl.env.num_generations': 2, 'rl.prompts_per_step': 256},
  # What this base cannot do: it seldom thinks step by step, and errs when it does.
  'weak_base': {
    'pretrain.steps': 600,
    'task.stride_weights': (0.6, 0.15, 0.15, 0.1),
    'rl.steps': 120,
  },
}


def sweep(add):
  for seed in range(3):
    for name, changes in VARIANTS.items():
      add(name=f'{name}-{seed}', seed=seed, **EVALUATION, **changes)
