"""One prompt, one completion: sample G completions of every prompt, decode them, score them.

Rollout r is row r, and its group is its prompt's place in the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from reasonrl import controls, records, rollouts, types


@dataclasses.dataclass(frozen=True)
class SingleTurn:
  """Settings; every default and its source is in `configs/common.py`."""

  num_generations: int
  max_completion_length: int
  temperature: float
  top_k: int
  top_p: float
  min_p: float
  max_kept_tokens: int
  slots: int
  controls: Mapping[str, Mapping]  # see `controls.build`

  reads: ClassVar[frozenset[str]] = frozenset()
  facts: ClassVar[tuple[str, ...]] = ()
  of_texts: ClassVar[bool] = False
  offers: ClassVar[str] = 'answers'

  def fits(self, setup, example) -> None:
    """Raises UserError if the prompt of an example is too long."""
    setup.prompt(example)

  def longest(self, tokenizer, max_prompt: int) -> int:
    """Tokens of the longest row."""
    del tokenizer
    return max_prompt + self.max_completion_length

  def describe(self, experience: types.Experience) -> dict[str, float]:
    """It has no metrics of its own."""
    del experience
    return {}

  def rollout(self, tools: types.Tools, state: dict, step: int) -> types.Experience:
    """Samples num_generations completions of each of the next prompts and scores them."""
    examples, G = tools.examples(), self.num_generations
    applied, numbers = controls.build(self.controls, tools.tokenizer)
    prompts = [tools.render(example) for example in examples]
    longest = types.padded(max(map(len, prompts)))
    tokens_PT = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens_PT, prompts, strict=True):
      row[: len(prompt)] = prompt
    prompt_R = np.repeat(np.arange(len(prompts), dtype=np.int32), G)
    sample_R = np.tile(np.arange(G), len(prompts))
    id_R = np.asarray([example.index for example in examples])[prompt_R]
    requests = types.Requests(
      tokens_PT=tokens_PT,
      length_P=np.asarray([len(prompt) for prompt in prompts], np.int32),
      prompt_R=prompt_R,
      key_R=tools.row_keys(step, id_R, sample_R, 0),
      max_new_R=np.full(prompt_R.size, self.max_completion_length, np.int32),
      numbers={name: np.full(prompt_R.size, number, np.int32) for name, number in numbers.items()},
      temperature_R=None,
    )
    spec = types.Spec.of(self, tools.tokenizer.eos_ids, applied)
    samples = tools.generate(state['params'], requests, spec, self.slots)
    experience = rollouts.fresh(
      state['version'],
      tokens_BT=samples.tokens_RS,
      prompt_length_B=samples.prompt_length_R,
      length_B=samples.length_R,
      source_BT=samples.source_RS,
      logp_BT=samples.logp_RS,
      stop_B=samples.stop_R,
      group_B=prompt_R,
      support={} if samples.kept_RSK is None else {'kept': samples.kept_RSK},
      examples=tuple(examples[p] for p in prompt_R),
      completions=tuple(self._completion(tools, samples, r) for r in range(prompt_R.size)),
    )
    return tools.reward(state, experience)

  def _completion(self, tools, samples, r) -> records.Completion:
    start, end = samples.prompt_length_R[r], samples.length_R[r]
    ids = tuple(samples.tokens_RS[r, start:end].tolist())
    stop = records.Stop(int(samples.stop_R[r]))
    ended = stop == records.Stop.EOS and ids[-1] in tools.tokenizer.eos_ids  # not by a string
    said = ids[:-1] if ended else ids
    text = tools.prefill + tools.tokenizer.decode(list(said), skip_special=False)
    return records.Completion(
      text=text,
      token_ids=ids,
      num_tokens=len(ids),
      think=records.think_span(text),
      stop=stop,
      cap=self.max_completion_length,
    )
