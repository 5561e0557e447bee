"""Three seeds of the tiny run and of its controls, at equal sampled completions per step.

  python experiments/sweep.py --config=configs/r1_zero.py --to=runs/r1_zero_shuffled_objects \
    --sweep=experiments/r1_zero_shuffled_objects/sweep.py --max_parallel=2

The controls start from the base of the run with the same seed, which comes first in the list.
"""

RUNS = 'runs/r1_zero_shuffled_objects'
# Held-out problems are answered 16 times each: pass@k, and a vote.
EVALUATION = {'evaluation.env.num_generations': 16, 'evaluation.env.slots': 512}
WHOLE = {
  'grpo': {},
  # What this base cannot do: it seldom thinks step by step, and errs when it does.
  'weak_base': {
    'pretrain.steps': 600,
    'task.stride_weights': (0.6, 0.15, 0.15, 0.1),
    'rl.steps': 120,
  },
}
CONTROLS = {
  'shuffled_rewards': {'rl.shuffle_rewards': True},
  'format_only': {'rewards.accuracy.weight': 0.0},
  'g2': {'rl.env.num_generations': 2, 'rl.prompts_per_step': 256},
}


def sweep(add):
  for name, changes in WHOLE.items():
    for seed in range(3):
      add(name=f'{name}-{seed}', seed=seed, **EVALUATION, **changes)
  for name, changes in CONTROLS.items():
    for seed in range(3):
      base = {
        'phases': ('rl',),
        'rl.init': f'{RUNS}/grpo-{seed}/phases/pretrain',
        'tokenizer.kind': 'saved',
        'tokenizer.path': f'{RUNS}/grpo-{seed}/tokenizer',
      }
      add(name=f'{name}-{seed}', seed=seed, **EVALUATION, **base, **changes)
