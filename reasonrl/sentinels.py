"""What must never be seen while training, looked for in every row of metrics."""

from __future__ import annotations

# Bounds on |log pi_trainer - log pi_sampler|. In bfloat16 single unlikely tokens differ by more
# than 1 without a bug, so there the mean is watched: over the GRPO steps of SmolLM2-135M it was at
# most 0.017 (experiments/r1_zero_smollm2).
MISMATCH = {'float32': ('mismatch/max', 1e-4), 'bfloat16': ('mismatch/mean', 0.05)}
STEP0_KL = 1e-5  # float32, before the first update: policy and reference are the same parameters


def warnings(row: dict, at_reference: bool, compute_dtype: str) -> list[str]:
  """What must never be seen while training. Empty when all is well.

  `at_reference`: the policy that sampled still was the reference.
  """
  found = []
  name, limit = MISMATCH[compute_dtype]
  if not row.get(name, 0.0) <= limit:  # NaN is never all right
    found.append(
      f'sampler and trainer log-probabilities: {name} {row[name]:.1e} is above {limit:.0e}; the '
      'parameters did not reach the sampler, or the two score different distributions'
    )
  if at_reference and compute_dtype == 'float32' and not row.get('kl', 0.0) <= STEP0_KL:
    found.append(f'KL to the reference before the first update is {row["kl"]:.1e}, not 0')
  if row.get('unmasked_tokens', 0):
    found.append(f'{row["unmasked_tokens"]:.0f} sampled tokens are not in the policy mask')
  if not row['finite']:
    found.append('the loss or a gradient was not finite: the step was skipped and its batch kept')
  return found
