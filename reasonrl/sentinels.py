"""Sentinels: what must never be seen while training, looked for in every row of metrics.

1. A sentinel is a name, a condition on the row, for how many steps in a row it must hold, and what
   to do about it: `SENTINELS`.
2. `watch` returns the names that fired, which go into the row, and lines for the screen: each
   sentinel at most every `SHOWN_EVERY` steps.
3. `checksum` tells whether two parameter trees are the same: what the sampler was given and what
   the learner had, what an update began with and what it left.

They print and count; they change no result and stop no run. What they count is part of a
checkpoint, so that a resumed run writes the rows of an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SHOWN_EVERY = 10  # steps

# Bounds on |log pi_trainer - log pi_sampler|. In bfloat16 single unlikely tokens differ by more
# than 1 without a bug, so there the mean is watched: over the GRPO steps of SmolLM2-135M it was at
# most 0.017 (experiments/r1_zero_smollm2).
MISMATCH = {'float32': ('mismatch/max', 1e-4)}
MISMATCH |= dict.fromkeys(('bfloat16', 'int8'), ('mismatch/mean', 0.05))
# Bounds on |ratio - 1| where old_logp came from the scoring path: two programs for one function.
# In bfloat16 single tokens are off by 0.15 without a bug, the mean by 0.0014 (SmolLM2-135M, CPU).
RATIO = {'float32': ('ratio_gap_max', 1e-4), 'bfloat16': ('ratio_gap', 0.02)}
STEP0_KL = 1e-5  # float32, before the first update: policy and reference are the same parameters
# A smaller gradient is rounding: that of the KL of a policy to itself has a norm of 1e-9.
GRAD_NORM = 1e-6
# Below this share of completions that end by themselves nearly all of the batch is cut off. A young
# policy may be there for a while, hence the patience.
EOS_RATE = 0.05
# Rewards are float32 numbers around 1: equal ones differ by less. One step without any difference
# is common in a small batch; many are a broken verifier, or a task that is solved or out of reach.
REWARD_STD = 1e-6
PATIENCE = 20  # steps
FAILURES = 0.01  # of the completions of a step: more is no longer a rare odd text


class Facts(NamedTuple):
  """What conditions know besides the row."""

  compute_dtype: str
  cache_dtype: str  # of the sampler
  at_reference: bool  # the policy that sampled still was the reference
  old_policy: str  # see `wiring.Phase.old_policy`
  learning: bool  # the learning rate is above 0
  reinforcing: bool  # what was sampled is trained on
  synced: bool  # the sampler was meant to have the parameters of the learner, not older ones


class Sentinel(NamedTuple):
  """condition: (row, facts) -> what is wrong, with the number, or ''."""

  name: str
  condition: Callable[[dict, Facts], str]
  steps: int  # in a row, before it fires
  advice: str


@jax.jit
def checksum(params) -> jax.Array:
  """float32 [leaves]: the sum of every parameter; the same program gives the same bits again.

  A sum over the bits themselves takes a CPU twenty times as long: more than 1 % of a step.
  """
  return jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(params)])


def compared(given, sampled_with: list, before, after) -> dict[str, float]:
  """Metrics from the checksums of a step, on the host.

  Args:
    given: of the parameters that were meant for the sampler: the learner's, or a copy that follows.
    sampled_with: of what `tools.generate` was given, call by call; an environment may also sample
      with others, such as the average. Empty: nothing was sampled by that tool.
    before, after: of the learner's parameters at the start of the step and after its updates.
  """
  row = {'params/changed': float(not np.array_equal(before, after))}
  if sampled_with:
    row['params/sampled'] = float(any(np.array_equal(given, each) for each in sampled_with))
  return row


def _above(row: dict, name: str, limit: float) -> bool:
  """NaN is above every limit. In a step that was not finite it has a sentinel of its own."""
  return name in row and bool(row['finite']) and not row[name] <= limit


def _mismatch(row, facts):
  name, limit = MISMATCH[facts.cache_dtype]
  bad = facts.synced and _above(row, name, limit)
  return f'sampler and trainer log-probabilities differ: {name} {row[name]:.1e}' if bad else ''


def _ratio(row, facts):
  name, limit = RATIO[facts.compute_dtype]
  if facts.old_policy == 'itself':  # by construction
    name, limit = 'ratio_gap_max', 0.0
  # Against the sampler's probabilities it is 1 up to what [mismatch] watches.
  bad = facts.old_policy != 'sampled' and _above(row, name, limit)
  return f'the ratio of the first update is not 1: {name} {row[name]:.1e}' if bad else ''


def _kl(row, facts):
  bad = facts.at_reference and facts.compute_dtype == 'float32' and _above(row, 'kl', STEP0_KL)
  return f'KL to the reference before the first update is {row["kl"]:.1e}, not 0' if bad else ''


def _stale(row, facts):
  bad = row.get('params/sampled') == 0
  return 'nothing was sampled with the parameters that were meant for it' if bad else ''


def _unmoved(row, facts):
  due = facts.learning and row['finite'] and row['grad_norm'] > GRAD_NORM
  bad = due and row.get('params/changed') == 0
  return f'no parameter changed, at gradient norm {row["grad_norm"]:.1e}' if bad else ''


def _mask(row, facts):
  bad = row.get('unmasked_tokens', 0)
  return f'{bad:.0f} sampled tokens are not in the policy mask' if bad else ''


def _eos(row, facts):
  bad = facts.reinforcing and row.get('eos_rate', 1.0) < EOS_RATE
  return f'{row["eos_rate"]:.1%} of the completions end by themselves' if bad else ''


def _rewards(row, facts):
  bad = facts.reinforcing and 'reward_std' in row and not row['reward_std'] > REWARD_STD
  return f'all rewards of a step are equal, {row["reward"]:.3g}' if bad else ''


def _verifier(row, facts):
  failed = row.get('reward_timeouts', 0) + row.get('reward_errors', 0)
  bad = failed > FAILURES * row.get('completions', 0)
  return f'rewards failed {failed:.0f} times on {row["completions"]:.0f} completions' if bad else ''


def _finite(row, facts):
  bad = not row.get('finite', 1)  # which a step without an update does not have
  return 'the loss or a gradient was not finite: the step was skipped' if bad else ''


SENTINELS = (
  Sentinel(
    'mismatch',
    _mismatch,
    1,
    'see [stale]; else sampler and trainer score different distributions: compare temperature, '
    'forbidden tokens and dtype',
  ),
  Sentinel(
    'ratio',
    _ratio,
    1,
    'old_logp must come from the parameters that sampled, before any update, at the temperature '
    'and on the tokens of training',
  ),
  Sentinel('kl', _kl, 1, 'reads.ref must start where the policy starts: look at its init'),
  Sentinel(
    'stale',
    _stale,
    1,
    "the environment must hand state['params'] of this step to tools.generate",
  ),
  Sentinel(
    'unmoved',
    _unmoved,
    1,
    'raise optim.learning_rate (smaller steps round away), or look at optim.lr_scale',
  ),
  Sentinel('mask', _mask, 1, 'the environment must mark every sampled token, EOS included'),
  Sentinel(
    'eos', _eos, PATIENCE, 'raise env.max_completion_length, or check the eos ids of the tokenizer'
  ),
  Sentinel(
    'rewards',
    _rewards,
    PATIENCE,
    'there is nothing to learn from: read rollouts.jsonl, then mend the reward or change the '
    'difficulty of the task',
  ),
  Sentinel(
    'verifier',
    _verifier,
    1,
    'failed rewards count 0: mend what the line of the failure names, or raise rewarding.timeout_s',
  ),
  Sentinel('finite', _finite, 1, 'nonfinite/ says where it began; --replay=FILE recomputes it'),
)


def watch(seen: dict, row: dict, facts: Facts, step: int) -> tuple[list[str], list[str], dict]:
  """Looks at the row of one step of a phase.

  Args:
    seen: what `watch` returned for the step before; {} at the start of a phase. JSON can hold it.
    row: metrics; what a sentinel needs and the row does not have, it does not watch.
    facts: see `Facts`.
    step: of the phase.

  Returns:
    names that fired, lines to show, and the next `seen`: name -> [steps in a row, step last shown].
  """
  fired, lines, after = [], [], {}
  for sentinel in SENTINELS:
    said = sentinel.condition(row, facts)
    streak, shown = seen.get(sentinel.name, [0, -SHOWN_EVERY])
    streak = streak + 1 if said else 0
    if streak >= sentinel.steps:
      fired.append(sentinel.name)
      if step - shown >= SHOWN_EVERY:
        shown = step
        lasting = f', for {streak} steps' if sentinel.steps > 1 else ''
        lines.append(f'step {step}: [{sentinel.name}] {said}{lasting}; {sentinel.advice}')
    after[sentinel.name] = [streak, shown]
  return fired, lines, after
