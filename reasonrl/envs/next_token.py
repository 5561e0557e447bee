"""Think before the next token of a text (RLP, arXiv 2510.01265).

1. Texts -> positions: x_<t is the context, x_t the token that the text really goes on with.
2. G thoughts of each context: `open`, up to `max_thought` sampled tokens, `close`. What follows in
   the text is no part of what the sampler sees.
3. One forward pass over context, thought and x_t gives the old log-probabilities of the thought and
   log p(x_t | x_<t, thought); one over the contexts log p(x_t | x_<t), without a thought.
4. The reward `information_gain` is their difference.

    think     context | <think> | thought ... </think> | x_t      p(x_t) is read at </think>
    no think  context | x_t                                       at the last token of the context

The policy sampled the thought, and </think> if it came by itself; where the thought was cut off
that is written. x_t is what the text says, given as the context is: nothing trains on it. A horizon
above 1 is an extension: so many tokens of the text behind one thought.

With `predicts` above 0 the model goes on behind its thought instead, and what it says is sampled
and trained as well: RPT (arXiv 2506.08007), rewards `prefix_match` and `token_match`.

</think> is the ids of the tag as it is encoded. Where byte pairs join its beginning to the thought
('.</') it is seen all the same; where they join its end to what would follow it is not, and the
thought goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np

from reasonrl import controls, positions, records, rollouts, sharding, types

# Whose prediction without a thought is compared with -> the role of its parameters.
NO_THINK = {'ema': 'ema', 'policy': 'params', 'ref': 'ref', 'empty_think': 'ema'}
THOUGHTS = ('own', 'other')


class Context(NamedTuple):
  """A position in a text."""

  example: records.Example
  slot: int  # of the positions of its text
  at: int  # the position
  before: np.ndarray  # ids, at most `max_context`
  after: np.ndarray  # ids from the position on
  kind: str
  trace: str  # the thought that would help; '' = none is known


class Sampled(NamedTuple):
  """What was sampled behind some prompts: one array per rollout."""

  ids: list[np.ndarray]
  logps: list[np.ndarray]
  kept: list[np.ndarray] | None  # [tokens, K]
  stop_R: np.ndarray


@dataclasses.dataclass(frozen=True)
class NextToken:
  """Settings; every default and its source is in `configs/common.py`."""

  # ---- where
  position_sampler: str
  positions_per_text: int
  every: int
  top_entropy: float
  class_weights: Mapping[str, float]
  max_context: int
  horizon: int
  # ---- the thought
  instruction: str
  num_generations: int
  max_thought: int
  min_thought: int
  train_close: bool
  temperature: float
  top_k: int
  top_p: float
  min_p: float
  max_kept_tokens: int
  slots: int
  # ---- what it is measured by
  no_think: str
  thoughts: str
  predicts: int

  controls: ClassVar[dict] = {}  # none from the config
  facts: ClassVar[tuple[str, ...]] = (records.CLASS,)
  of_texts: ClassVar[bool] = True

  def __post_init__(self):
    choices = {'position_sampler': positions.SAMPLERS, 'no_think': NO_THINK, 'thoughts': THOUGHTS}
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise records.UserError(f'{name}={getattr(self, name)!r} is not one of {tuple(allowed)}')
    least = dict.fromkeys(('positions_per_text', 'every', 'max_context', 'horizon'), 1)
    for name, value in {**least, 'min_thought': 1, 'predicts': 0}.items():
      if getattr(self, name) < value:
        raise records.UserError(f'{name}={getattr(self, name)} must be at least {value}')
    if self.max_thought <= self.min_thought:
      raise records.UserError(
        f'max_thought={self.max_thought} must be above min_thought={self.min_thought}'
      )
    if not 0 < self.top_entropy <= 1:
      raise records.UserError(f'top_entropy={self.top_entropy} must be in (0, 1]')
    weights = self.class_weights.values()
    if min(weights, default=0) < 0 or sum(weights) > 1 + 1e-6:
      raise records.UserError(f'class_weights={dict(self.class_weights)}: sum of them at most 1')
    if self.thoughts == 'other' and self.predicts:
      raise records.UserError("thoughts='other' needs predicts=0: a text that goes on by itself")

  @property
  def reads(self) -> frozenset[str]:
    """Roles of parameters that a rollout needs besides the policy's."""
    reads = not self.predicts or self.position_sampler == 'topq_entropy'
    return frozenset({NO_THINK[self.no_think]}) - {'params'} if reads else frozenset()

  @property
  def offers(self) -> str:
    """What rewards may need: scores of the text, or what was said instead."""
    return 'said' if self.predicts else 'scores'

  @property
  def max_completion_length(self) -> int:
    """Tokens behind <think> at most: the thought, </think> as one token, and what is said then."""
    return self.max_thought + 1 + self.predicts

  def fits(self, setup, example) -> None:
    """Raises UserError if no position of a text can be thought about."""
    if records.TEXT not in example.meta:
      raise records.UserError(f"env 'next_token' reads texts; task {example.task!r} has problems")
    size, least = len(setup.text(example)[0]), self.horizon
    least += self.every if self.position_sampler == 'every_k' else 1
    if size < least:
      raise records.UserError(
        f'{example.task}/{example.split}/{example.index} has {size} tokens, but {least} are the '
        'least that a context and what follows need'
      )

  def longest(self, tokenizer, max_prompt: int) -> int:
    """Tokens of the longest row, and of the window that it is sampled in; there is no prompt."""
    del max_prompt
    given, opening, close = (len(tokenizer.encode(x)) for x in self._written)
    prompt = self.max_context + given + opening
    behind = prompt + self.max_thought + close
    windows = types.padded(prompt) + self.max_thought, types.padded(behind) + self.predicts
    return max(windows[0], windows[1] if self.predicts else behind + self.horizon)

  @property
  def _written(self) -> tuple[str, str, str]:
    return self.instruction, records.THINK_OPEN, records.THINK_CLOSE

  # ---------------------------------------------------------------------------------- a rollout

  def rollout(self, tools: types.Tools, state: dict, step: int) -> types.Experience:
    """Thinks num_generations times about the next token at positions of the next texts."""
    G, found = self.num_generations, self._contexts(tools, state, step)
    ids = lambda text: np.asarray(tools.tokenizer.encode(text), np.int32)
    given, opening, close = map(ids, self._written)
    context_R = np.repeat(np.arange(len(found), dtype=np.int32), G)
    prompts = [np.concatenate([given, context.before, opening]) for context in found]
    id_R = np.asarray([context.example.index for context in found])[context_R]
    slot_R = np.asarray([context.slot for context in found])[context_R]
    keys = lambda thread: tools.row_keys(
      step, id_R, slot_R * G + np.tile(np.arange(G), len(found)), thread
    )

    control = self._control(tools)
    spec = types.Spec.of(self, tools.tokenizer.eos_ids, (control,))
    thought = self._sample(tools, state, prompts, context_R, keys(0), self.max_thought, spec)
    closed_R = thought.stop_R == records.Stop.EOS
    tags = [close[:0] if closed else close for closed in closed_R]  # those that are written
    heads = [np.concatenate(parts) for parts in zip(thought.ids, tags, strict=True)]
    said = None
    if self.predicts:
      behind = [
        np.concatenate([prompts[c], head]) for c, head in zip(context_R, heads, strict=True)
      ]
      each = np.arange(len(behind), dtype=np.int32)
      spec = types.Spec.of(self, tools.tokenizer.eos_ids, ())
      said = self._sample(tools, state, behind, each, keys(1), self.predicts, spec)
    ends = said.ids if said else [found[c].after[: self.horizon] for c in context_R]
    tokens_BT, length_B = padded(
      [np.concatenate([prompts[c], *row]) for c, *row in zip(context_R, heads, ends, strict=True)]
    )
    if said:
      heads = [np.concatenate(parts) for parts in zip(heads, said.ids, strict=True)]

    # ---- who wrote which token, and what it was drawn from
    size = lambda arrays: np.asarray([x.size for x in arrays], np.int32)
    prompt_B, thought_B = size(prompts)[context_R], size(thought.ids)
    head_B = thought_B + size(tags)
    untrained_B = 0 if self.train_close else closed_R * close.size
    at_BT = np.arange(tokens_BT.shape[1])[None] - prompt_B[:, None]
    inside = lambda a_B, b_B: (
      (at_BT >= np.reshape(a_B, (-1, 1))) & (at_BT < np.reshape(b_B, (-1, 1)))
    )
    thought_BT, said_BT = inside(0, thought_B), inside(head_B, length_B - prompt_B)
    policy_BT = inside(0, thought_B - untrained_B) | (said_BT & bool(said))
    sampled = [(thought_BT, thought), *([(said_BT, said)] if said else [])]

    def spread(name, fill, dtype):
      first = getattr(thought, name)[0]
      out = np.full((*tokens_BT.shape, *first.shape[1:]), fill, dtype)
      for mask_BT, of in sampled:
        out[mask_BT] = np.concatenate(getattr(of, name))
      return out

    table = control.barred(self.max_thought)
    barred_BTK = np.full((*tokens_BT.shape, table.shape[1]), -1, np.int32)
    barred_BTK[thought_BT] = table[at_BT[thought_BT]]
    support = {'barred': barred_BTK}
    if thought.kept is not None:
      support['kept'] = spread('kept', -1, np.int32)
    source_BT = np.where(inside(0, head_B), types.ENVIRONMENT, types.PROMPT)
    experience = rollouts.fresh(
      state['version'],
      tokens_BT=tokens_BT,
      prompt_length_B=prompt_B,
      length_B=length_B,
      source_BT=np.where(policy_BT, types.POLICY, source_BT).astype(np.int8),
      logp_BT=spread('logps', 0.0, np.float32) * policy_BT,
      stop_B=thought.stop_R,
      group_B=context_R,
      support=support,
      examples=tuple(
        self._example(tools, found[c], said and said.ids[r]) for r, c in enumerate(context_R)
      ),
      completions=tuple(
        self._completion(tools, head, stop)
        for head, stop in zip(heads, thought.stop_R, strict=True)
      ),
    )
    if not said:
      scores = self._scores(tools, state, experience, found, [prompts[c] for c in context_R], heads)
      experience = dataclasses.replace(experience, scores=scores)
    return tools.reward(state, experience)

  # ---------------------------------------------------------------------------------- its parts

  def _contexts(self, tools, state, step) -> list[Context]:
    """The chosen positions of the next texts."""
    examples = tools.examples()
    texts = [tools.text(example) for example in examples]
    entropies = [None] * len(texts)
    if self.position_sampler == 'topq_entropy':
      read = [ids[: self.max_context + 1] for ids, _ in texts]
      rows = as_text(read, np.asarray([len(ids) - 1 for ids in read]))
      entropies = tools.score(state[NO_THINK[self.no_think]], rows).entropy_BT
    keys = tools.row_keys(step, np.asarray([e.index for e in examples]), 0, 2)
    found = []
    for example, (ids, first), key, entropy_T in zip(examples, texts, keys, entropies, strict=True):
      last, among = len(ids) - self.horizon, ()
      if last < 1:
        continue
      spans = example.meta.get(records.CLASSES, ())
      kinds = positions.classes(tools.tokenizer, ids, first, spans)
      if entropy_T is not None:
        among = positions.uncertain(entropy_T, min(last, self.max_context), self.top_entropy)
      chosen = positions.choose(
        self.position_sampler,
        np.random.default_rng(key),
        last,
        self.positions_per_text,
        self.every,
        [kind for kind, _ in kinds],
        self.class_weights,
        among,
      )
      for slot, t in enumerate(chosen):
        before = ids[max(t - self.max_context, 0) : t]
        found.append(Context(example, slot, t, before, ids[t:], *kinds[t]))
    if not sharding.agree_min(len(found)):  # all processes hear of it
      raise records.UserError(
        f'no text of a step has the {self.horizon + 1} tokens or more that a context and what '
        'follows need'
      )
    return found

  def _control(self, tools) -> controls.Thought:
    """A thought has neither EOS nor, where that is one token, <think>."""
    opening = tools.tokenizer.encode(records.THINK_OPEN)
    never = {*tools.tokenizer.eos_ids, *(opening if len(opening) == 1 else ())}
    return controls.Thought.of(tools.tokenizer, self.min_thought, tuple(sorted(never)))

  def _sample(self, tools, state, prompts, prompt_R, key_R, most: int, spec) -> Sampled:
    tokens_PT, length_P = padded(prompts, types.padded(max(map(len, prompts))))
    requests = types.Requests(
      tokens_PT=tokens_PT,
      length_P=length_P,
      prompt_R=prompt_R,
      key_R=key_R,
      max_new_R=np.full(prompt_R.size, most, np.int32),
      numbers={},
      temperature_R=None,
    )
    samples = tools.generate(state['params'], requests, spec, self.slots)
    spans = list(zip(samples.prompt_length_R, samples.length_R, strict=True))
    cut = lambda x: [row[a:b] for row, (a, b) in zip(x, spans, strict=True)]
    kept = None if samples.kept_RSK is None else cut(samples.kept_RSK)
    return Sampled(cut(samples.tokens_RS), cut(samples.logp_RS), kept, samples.stop_R)

  def _scores(self, tools, state, experience, found, prompts, heads) -> dict[str, np.ndarray]:
    """old_logp [B, T]; and of the tokens that follow, with and without the thought: log p, and
    whether nothing is likelier, [B, horizon]."""
    H, rows, own = self.horizon, experience.rows, self.thoughts == 'own'
    if own:
      rows = rows._replace(plain_BT=last(rows.length_B, rows.tokens_BT.shape[1], H))
    else:
      ends = [found[c].after[:H] for c in experience.group_B]
      heads = [heads[r] for r in self._of_other_texts(found)]
      rows = as_text([np.concatenate(row) for row in zip(prompts, heads, ends, strict=True)], H)
    think = tools.score(state['params'], rows)
    tags = tools.tokenizer.encode(records.THINK_OPEN + records.THINK_CLOSE)
    empty = [tags] * (self.no_think == 'empty_think')
    plainly = as_text([np.concatenate([c.before, *empty, c.after[:H]]) for c in found], H)
    no_think = tools.score(state[NO_THINK[self.no_think]], plainly)
    scores = {'old_logp': think.logp_BT * rows.drawn_BT} if own else {}
    for name, of, length_B, times in (
      ('predicted', think, rows.length_B, 1),
      ('unthought', no_think, plainly.length_B, self.num_generations),
    ):
      index_BH = length_B[:, None] - H + np.arange(H)
      for key, x_BT in ((name, of.logp_BT), (f'{name}_likeliest', of.likeliest_BT)):
        scores[key] = np.repeat(np.take_along_axis(x_BT, index_BH, axis=1), times, axis=0)
    scores['no_think_length'] = np.repeat(plainly.length_B, self.num_generations)
    return scores

  def _of_other_texts(self, found) -> list[int]:
    """For each rollout that of the same number at the next position of another text."""
    n, G = len(found), self.num_generations
    ahead = lambda i: [(i + k) % n for k in range(1, n)]
    others = [[j for j in ahead(i) if found[j].example is not found[i].example] for i in range(n)]
    if not all(others):
      raise records.UserError("thoughts='other' needs two texts in a step on every process")
    return [each[0] * G + g for each in others for g in range(G)]

  def _example(self, tools, context: Context, said) -> records.Example:
    """The context as a problem whose answer is what follows."""
    decode, eos_ids = tools.tokenizer.decode, tools.tokenizer.eos_ids
    shown, meta = context.after[: self.horizon].tolist(), {}
    if said is not None:  # its EOS ends what is said; text is text
      words = said.tolist()[: -1 if said[-1] in eos_ids else None]
      meta[records.SAID] = decode(words, skip_special=False)
      most = len(meta[records.SAID].encode())  # a token has a byte or more
      shown = [i for i in context.after[: max(most, 1)].tolist() if i not in eos_ids]
      ends = [len(decode(shown[: n + 1], skip_special=False).encode()) for n in range(len(shown))]
      meta[records.NEXT_BYTES] = ends
    meta |= {
      records.CLASS: context.kind or ('end' if context.after[0] in eos_ids else 'text'),
      records.TRACE: context.trace,
      records.NEXT_ID: int(context.after[0]),
      records.SAID_ID: None if said is None else int(said[0]),
      records.SAID_SIZE: 0 if said is None else said.size,
      'position': context.at,
    }
    return dataclasses.replace(
      context.example,
      problem=decode(context.before.tolist(), skip_special=True),
      answer=decode(shown, skip_special=False),
      solution=None,
      meta=meta,
    )

  def _completion(self, tools, ids, stop) -> records.Completion:
    text = records.THINK_OPEN + tools.tokenizer.decode(ids.tolist(), skip_special=False)
    return records.Completion(
      text=text,
      token_ids=tuple(ids.tolist()),
      num_tokens=ids.size,
      think=records.think_span(text),
      stop=records.Stop(int(stop)),
      cap=self.max_completion_length - 1 + len(tools.tokenizer.encode(records.THINK_CLOSE)),
    )

  # ---------------------------------------------------------------------------------- metrics

  def describe(self, experience: types.Experience) -> dict[str, float]:
    """Mean reward by the kind of token, and what the step costs, in tokens through the model."""
    kinds = [example.meta[records.CLASS] for example in experience.examples]
    every = sharding.gather({'kind': kinds, 'reward': experience.reward_R.tolist()})
    pairs = [pair for each in every for pair in zip(each['kind'], each['reward'], strict=True)]
    rewards = {kind: [r for k, r in pairs if k == kind] for kind in sorted({k for k, _ in pairs})}
    means = {f'reward/class={kind}': float(np.nanmean(rs)) for kind, rs in rewards.items()}
    return means | token_forwards(experience, self)


def token_forwards(experience: types.Experience, cfg: NextToken) -> dict[str, float]:
  """Tokens that a step takes through the model, padding left out; a backward pass counts twice.

      formula = B Lc  +  B G L  +  B G (Lc + L)  +  B Lc   +  3 B G (Lc + L)
                prefill  decode    score            no think  train

  for B contexts of Lc tokens in the mean, with G thoughts of the cap L. Scores and training have
  what follows the thought in their rows as well. Training is one pass over one experience; texts
  beside it, a reference, and looking for hard positions are left out.
  """
  prompt_B, length_B = experience.prompt_length_B, experience.length_B
  first = np.unique(experience.group_B, return_index=True)[1]
  prompts, whole = float(prompt_B[first].sum()), float(length_B.sum())
  behind = float((length_B - prompt_B).sum())
  counts = {'prefill': prompts, 'decode': behind, 'train': 3.0 * whole}
  if cfg.predicts:  # what is said is sampled behind a prefill of its own
    counts['prefill'] += whole - sum(e.meta[records.SAID_SIZE] for e in experience.examples)
  else:
    counts['decode'] -= length_B.size * cfg.horizon
    counts['score'] = whole
    counts['no_think'] = float(experience.scores['no_think_length'][first].sum())
  counts['total'] = sum(counts.values())
  L, B, rows = cfg.max_thought, first.size, length_B.size
  context = prompts / B
  counts['formula'] = 2 * B * context + rows * L + 4 * rows * (context + L)
  return {f'token_forwards/{name}': sharding.total(count) for name, count in counts.items()}


def padded(rows, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """int32 [B, T], right-padded to the longest row, or to `width`; and their lengths."""
  length_B = np.asarray([len(row) for row in rows], np.int32)
  tokens_BT = np.zeros((len(rows), max(width, length_B.max())), np.int32)
  for tokens_T, row in zip(tokens_BT, rows, strict=True):
    tokens_T[: len(row)] = row
  return tokens_BT, length_B


def last(length_B, T: int, count) -> np.ndarray:
  """float32 [B, T], 1 on the last `count` tokens of rows of these lengths."""
  at_BT = np.arange(T)[None] - (length_B - count)[:, None]
  return ((at_BT >= 0) & (at_BT < np.reshape(count, (-1, 1)))).astype(np.float32)


def as_text(sequences, count) -> types.Rows:
  """Rows of which the last `count` tokens are scored, as text."""
  tokens_BT, length_B = padded(sequences)
  plain_BT = last(length_B, tokens_BT.shape[1], count)
  return types.Rows(tokens_BT, length_B, np.zeros_like(plain_BT), plain_BT, {})
