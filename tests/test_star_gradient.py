"""STaR is a policy gradient (arXiv 2203.14465, eq. 1 and 2): the filter is the indicator reward.

    grad J = sum_i E[ 1(a_i = y_i) grad log p(a_i, r_i | x_i) ]

For one step on samples at temperature 1, without restart and with nothing else than that filter,
the gradient of the kept completions' likelihood is that of J, up to the factor sampled / kept.
"""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from reasonrl import collecting, data, learner, packing
from reasonrl.tasks import TASKS


def test_on_a_policy_of_two_tokens():
  """By hand: p(1) = sigmoid(theta) for both tokens; right is '11'."""
  theta, samples = 0.3, [(1, 1), (1, 0), (0, 1), (1, 1), (0, 0)]
  logp = lambda theta, t: jax.nn.log_sigmoid(theta if t else -theta)
  right = [pair for pair in samples if pair == (1, 1)]

  def mean_loss(theta, pairs, loss, advantages):
    """Mean over the samples of the sum over their tokens of a library's token loss."""
    logp_M = jnp.stack([logp(theta, t) for pair in pairs for t in pair])
    adv_M = jnp.repeat(jnp.asarray(advantages, jnp.float32), 2)
    out = learner.Out(logp_M, jnp.zeros_like(logp_M))
    return loss(out, {'adv': adv_M, 'weight': jnp.ones_like(adv_M)})[0].sum() / len(pairs)

  algorithm = tiny.algorithm(baseline='none', scale_rewards='none', surrogate='reinforce')
  indicator = [float(pair == (1, 1)) for pair in samples]
  policy_gradient = -jax.grad(mean_loss)(theta, samples, algorithm.token_loss, indicator)
  star = jax.grad(mean_loss)(theta, right, learner.nll, [1.0] * len(right))
  policy_gradient, star = float(policy_gradient), float(star)
  # d log p(1) / d theta = 1 - sigmoid(.3) = .425557; two tokens, two of five samples right
  assert policy_gradient == pytest.approx(2 / 5 * 2 * 0.425557, rel=1e-5)
  assert star == pytest.approx(-2 * 0.425557, rel=1e-5)
  assert star == pytest.approx(-(len(samples) / len(right)) * policy_gradient, rel=1e-6)


def gradients(student, params, sequences, denominator):
  batches, _ = packing.pack(sequences, 16, 2, share=True)
  grads, _, _ = student.gradients(params, batches, (denominator,))
  return jax.tree.leaves(grads)


def test_the_engine_has_the_same_gradient(tmp_path):
  """What `collect` stores and a phase reads, under 'nll', against an indicator reward."""
  policy = tiny.model()
  params = policy.init(jax.random.key(1))
  experience = tiny.experience([1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2], [3, 5, 2, 4, 6, 1])
  prompt, end = experience.prompt_length_B, experience.length_B
  said = [tuple(t[p:n].tolist()) for t, p, n in zip(experience.tokens_BT, prompt, end, strict=True)]
  completions = [
    dataclasses.replace(completion, token_ids=ids)
    for completion, ids in zip(experience.completions, said, strict=True)
  ]
  experience = dataclasses.replace(experience, completions=tuple(completions))
  algorithm = tiny.algorithm(
    baseline='none', scale_rewards='none', surrogate='reinforce', loss_agg='seq_mean_token_sum'
  )
  weight_BT, denominator = algorithm.weights(experience)
  aux = {'weight': weight_BT, 'adv': algorithm.advantages(experience)}
  sampled = packing.sequences(experience.tokens_BT, experience.length_B, aux)
  reinforce = tiny.make_learner(policy, params, learner.Term(algorithm.token_loss, None, 'weight'))
  policy_gradient = gradients(reinforce, params, sampled, denominator)

  tokenizer = types.SimpleNamespace(eos_ids=range(11))  # whatever token a row ends with
  keeper = collecting.Keeper('accuracy', {'accuracy': (None, 1.0)}, tokenizer, '')
  asked = [experience.examples[r] for r in (0, 2, 4)]
  rows = keeper.rows(experience, asked, range(3), phase='collect', iteration=0, step=1)
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  read = TASKS['collected'](phase='collect', seed=0, balance='', path=str(path))
  prompts = {f'p{r}': experience.tokens_BT[r, : prompt[r]].tolist() for r in range(6)}
  examples = [read.example('train', i) for i in range(3)]
  kept = [data.supervised_sequence(None, prompts[e.problem], '', e, 16) for e in examples]
  # 3 of 6 were kept; the supervised loss is a mean over their 3 + 2 + 6 tokens
  trained = sum(seq.index_M.size for seq in kept)
  assert trained == 11 and denominator == 6
  supervised = tiny.make_learner(policy, params, learner.Term(learner.nll, None, 'weight'))
  star = gradients(supervised, params, kept, float(trained))
  assert max(float(jnp.abs(g).max()) for g in policy_gradient) > 0.01
  for ours, theirs in zip(star, policy_gradient, strict=True):
    np.testing.assert_allclose(ours * trained / 6, theirs, atol=1e-6)
