"""Builders shared by the tests of the loss side: a tiny decoder, a learner, an experience."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from reasonrl import learner, optim, records, sharding, types
from reasonrl.algorithms import grpo
from reasonrl.configs import common
from reasonrl.models import decoder

MODEL = {
  **{'vocab_size': 11, 'num_layers': 1, 'width': 8, 'num_heads': 2, 'num_kv_heads': 1},
  **{'head_dim': 4, 'mlp_width': 8},
}


def model(**changes) -> decoder.Decoder:
  fields = {**common.model('nano').to_dict(), **MODEL, **changes}
  return decoder.Decoder(**{f.name: fields[f.name] for f in dataclasses.fields(decoder.Decoder)})


def optimizer(**changes) -> optim.Optim:
  return optim.Optim(**{**common.optim(1e-2).to_dict(), **changes})


def algorithm(preset='grpo', **changes) -> grpo.GRPO:
  fields = common.algorithm(preset).to_dict()
  return grpo.GRPO(**{k: v for k, v in {**fields, **changes}.items() if k != 'name'})


def make_learner(policy, params, *terms, steps=10, ema_decay=None, **changes) -> learner.Learner:
  """A learner on one device; `changes` are fields of the optimizer."""
  return learner.Learner(
    model=policy,
    mesh=sharding.make_mesh(1, 1, 1),
    tx=optim.build(optimizer(**changes), params, steps),
    ema_decay=ema_decay,
    terms=terms or (learner.Term(learner.nll, None, 'weight'),),
    form=(1.0, None, 1.0, jnp.dtype('float32')),
    forbidden=(),
    loss_backend='auto',
    loss_chunk=16,
  )


def experience(rewards, groups, lengths, prompt_length=2, vocab=11, seed=0, **changes):
  """One row per reward: random prompts and completions of the given lengths, EOS at the end."""
  R, rng = len(rewards), np.random.default_rng(seed)
  lengths = np.asarray(lengths)
  T = prompt_length + lengths.max()
  at = np.arange(T)[None, :]
  sampled = (at >= prompt_length) & (at < prompt_length + lengths[:, None])
  fields = dict(
    tokens_BT=rng.integers(0, vocab, (R, T)).astype(np.int32),
    prompt_length_B=np.full(R, prompt_length, np.int32),
    length_B=(prompt_length + lengths).astype(np.int32),
    source_BT=np.where(sampled, types.POLICY, types.PROMPT).astype(np.int8),
    logp_BT=np.where(sampled, -rng.random((R, T)), 0.0).astype(np.float32),
    stop_B=np.full(R, int(records.Stop.EOS), np.int32),
    version_B=np.zeros(R, np.int32),
    group_B=np.asarray(groups, np.int32),
    rollout_B=np.arange(R, dtype=np.int32),
    reward_R=np.asarray(rewards, np.float32),
    parts={'accuracy': np.asarray(rewards, np.float32)},
    reward_weights={'accuracy': 1.0},
    reward_BT=None,
    support={},
    scores={},
    examples=tuple(records.Example('t', 'train', r, f'p{r}', 'a', None, {}) for r in range(R)),
    completions=tuple(
      records.Completion(
        text=f'c{r}',
        token_ids=(1,) * int(n),
        num_tokens=int(n),
        think=None,
        stop=records.Stop.EOS,
        cap=int(lengths.max()),
      )
      for r, n in enumerate(lengths)
    ),
  )
  return types.Experience(**(fields | changes))
