"""From an example to the token ids that the policy continues.

1. `Prompter.shots` are worked examples, from a file or the task, that stand before the problem.
2. A template lays both out as segments of trusted and untrusted text.
3. `Prompter.render` encodes them: what a problem contains can never become a turn mark.

A file of worked examples is that of STaR (arXiv 2203.14465): separated by blank lines and used
verbatim, so none of them can contain a blank line.

Left out on purpose: several turns (an environment appends token ids; it never renders again) and
truncation (a prompt that is too long is an error).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
from collections.abc import Callable

import jinja2
from jinja2 import ext, sandbox

from reasonrl import records, tokenizers

# (text, trusted): trusted text is ours, and control strings in it become control ids.
Segment = tuple[str, bool]

# DeepSeek-R1-Zero, arXiv 2501.12948 version 2, table 1.
R1_ZERO = (
  'A conversation between User and Assistant. The user asks a question, and the Assistant '
  'solves it. The assistant first thinks about the reasoning process in the mind and then '
  'provides the user with the answer. The reasoning process and answer are enclosed within '
  '<think>...</think> and <answer>...</answer> tags, respectively, i.e., <think> reasoning '
  'process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:'
)

# Some chat templates print today's date; prompts must not change from one day to the next.
TODAY = datetime.datetime(2024, 7, 26)

TASK = 'task'  # value of few_shot

# Stands for the problem while a chat template is rendered. Private use: no template contains it.
_PLACEHOLDER = '\ue000problem\ue000'


@dataclasses.dataclass(frozen=True)
class Prompter:
  """Renders prompts.

  Attributes:
    template: a key of TEMPLATES.
    system: system message of a 'chat' prompt; '' = none of ours (the template may have its own).
    prefill: how the completion is made to begin, e.g. '<think>'; '' = nothing. It belongs to the
      prompt: the policy did not write it, so the environment puts it back for the rewards.
    add_bos: start with the tokenizer's BOS; not with 'chat', whose template writes its own.
    max_length: the most tokens a prompt may have: the sampler's window less the completion.
    few_shot: '' = no worked examples, 'task' = those of `worked`, else the path of a text file.
    few_shot_hinted: path of the file for examples that show their hint; '' = the same.
    few_shot_count: worked examples in a prompt; 0 = all of the file.
    worked: (example, count) -> solved examples to stand before it, those of the task; None: the
      task has none. Where the example shows its hint, so do they.

  Raises:
    UserError: a field is none of these, or a file cannot be read or has too few examples.
  """

  template: str
  system: str
  prefill: str
  add_bos: bool
  max_length: int
  few_shot: str
  few_shot_hinted: str
  few_shot_count: int
  worked: Callable[[records.Example, int], list[records.Example]] | None

  def __post_init__(self):
    if self.template not in TEMPLATES:
      choices = ', '.join(TEMPLATES)
      raise records.UserError(f'unknown prompt template {self.template!r}; choose from {choices}')
    if self.template == 'chat' and self.add_bos:
      raise records.UserError(
        "add_bos must be False with template 'chat', which writes its own BOS"
      )
    if self.template != 'chat' and self.system:
      raise records.UserError(
        f"system={self.system!r} needs template 'chat', not {self.template!r}"
      )
    if self.few_shot_hinted and self.few_shot in ('', TASK):
      raise records.UserError(
        f'few_shot_hinted={self.few_shot_hinted!r} needs a file in few_shot, not {self.few_shot!r}'
      )
    if self.few_shot == TASK and self.worked is None:
      raise records.UserError("few_shot='task', but this task has no worked examples: give a file")
    if self.few_shot_count and not self.few_shot:
      raise records.UserError(
        f"few_shot_count={self.few_shot_count} needs few_shot='task' or a file, not ''"
      )
    least = 1 if self.few_shot == TASK else 0
    if self.few_shot_count < least:
      raise records.UserError(
        f'few_shot_count={self.few_shot_count}: at least {least} with few_shot={self.few_shot!r}'
      )
    _ = self._files  # read now: a bad file stops the run at its start

  @functools.cached_property
  def _files(self) -> dict[bool, list[str]]:
    """The worked examples of the files, for prompts without and with a hint."""
    if self.few_shot in ('', TASK):
      return {}
    paths = {False: self.few_shot, True: self.few_shot_hinted or self.few_shot}
    return {shown: read_shots(path, self.few_shot_count) for shown, path in paths.items()}

  def shots(self, example: records.Example) -> list[str]:
    """The worked examples that stand before an example.

    Raises:
      UserError: the task has fewer than `few_shot_count`.
    """
    shown = example.meta.get(records.HINT_SHOWN, False)
    if self.few_shot != TASK:
      return self._files.get(shown, [])
    found = self.worked(example, self.few_shot_count)
    if len(found) < self.few_shot_count:
      raise records.UserError(
        f'task {example.task!r} has {len(found)} worked examples for {example.split}/'
        f'{example.index}, but few_shot_count={self.few_shot_count}'
      )
    return [(records.show_hint(shot) if shown else shot).problem + shot.solution for shot in found]

  def render(
    self, tokenizer: tokenizers.Tokenizer, example: records.Example, few_shot: bool = True
  ) -> list[int]:
    """Token ids of the (already augmented, see `augmentations`) example's prompt, prefill included.

    Args:
      tokenizer: of the policy.
      example: its problem is rendered; `meta` says whether that shows a hint.
      few_shot: False leaves the worked examples out.

    Raises:
      UserError: the prompt is longer than `max_length`; the tokenizer lacks the BOS or the chat
        template that is asked for; the chat template fails or drops the problem; `shots`.
    """
    ids = []
    if self.add_bos:
      if tokenizer.bos_id is None:
        raise records.UserError('add_bos=True, but the tokenizer has no BOS')
      ids.append(tokenizer.bos_id)
    problem = '\n\n'.join([*(self.shots(example) if few_shot else ()), example.problem])
    segments = TEMPLATES[self.template](tokenizer, self.system, problem)
    for text, trusted in (*segments, (self.prefill, True)):
      ids += tokenizer.encode(text) if trusted else tokenizer.encode_user(text)
    if len(ids) > self.max_length:
      raise records.UserError(
        f'the prompt of {example.task}/{example.split}/{example.index} has {len(ids)} tokens, '
        f'but prompt.max_length={self.max_length}'
      )
    return ids


def read_shots(path: str, count: int) -> list[str]:
  """The first `count` worked examples of a text file (its format: see above); 0 = all.

  Raises:
    UserError: it cannot be read, or has fewer or none.
  """
  try:
    text = pathlib.Path(path).expanduser().read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise records.UserError(f'cannot read the worked examples: {error}') from None
  blocks = itertools.groupby(text.split('\n'), key=lambda line: bool(line.strip()))
  shots = ['\n'.join(lines) for filled, lines in blocks if filled]
  if len(shots) < max(count, 1):
    raise records.UserError(
      f'{path!r} has {len(shots)} worked examples (blocks between blank lines), not {max(count, 1)}'
    )
  return shots[: count or None]


def plain(tokenizer: tokenizers.Tokenizer, system: str, problem: str) -> list[Segment]:
  """The problem as it is."""
  del tokenizer, system
  return [(problem, False)]


def r1_zero(tokenizer: tokenizers.Tokenizer, system: str, problem: str) -> list[Segment]:
  """The base-model prompt of DeepSeek-R1-Zero."""
  del tokenizer, system
  before, after = R1_ZERO.split(' {prompt}')
  # The space travels with the problem: byte-level vocabularies have ' What', not ' ' + 'What'.
  return [(before, True), (' ' + problem + after, False)]


def chat(tokenizer: tokenizers.Tokenizer, system: str, problem: str) -> list[Segment]:
  """One user turn in the model's own chat format, opened for the assistant's answer."""
  if tokenizer.chat_template is None:
    raise records.UserError(
      "template 'chat' needs a tokenizer with a chat template; this one has none"
    )
  messages = [{'role': 'system', 'content': system}] if system else []
  messages.append({'role': 'user', 'content': _PLACEHOLDER})
  bos = None if tokenizer.bos_id is None else tokenizer.id_to_piece(tokenizer.bos_id)
  try:
    text = _compile(tokenizer.chat_template).render(
      messages=messages,
      add_generation_prompt=True,
      tools=None,
      bos_token=bos,
      eos_token=tokenizer.id_to_piece(tokenizer.eos_ids[0]),
    )
  except jinja2.TemplateError as error:
    raise records.UserError(f'the chat template fails: {error}') from error
  before, *rest = text.split(_PLACEHOLDER)
  if not rest:
    raise records.UserError('the chat template drops the user message')
  segments = [(before, True)]
  for part in rest:
    segments += [(problem, False), (part, True)]
  return segments


TEMPLATES = {'plain': plain, 'r1_zero': r1_zero, 'chat': chat}


class _Generation(ext.Extension):
  """`{% generation %}` marks what an assistant wrote, for training masks. Here: just its body."""

  tags = {'generation'}

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(('name:endgeneration',), drop_needle=True)


@functools.cache
def _compile(source):
  """A chat template comes with a downloaded model: it is compiled in a sandbox.

  The settings are those that the templates were written against, in transformers.
  """
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', _Generation]
  )

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = TODAY.strftime
  environment.filters['tojson'] = functools.partial(json.dumps, ensure_ascii=False)
  return environment.from_string(source)
