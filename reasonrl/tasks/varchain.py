"""VarChain: a text in which some tokens need reasoning, and it is known which.

    a=3;b=a+4;c=b*2;?c=4;nopapinonapa          all arithmetic is modulo `modulus`

A segment assigns `a` and then one variable for each hop, asks for the last and tells it; words of a
Markov chain follow. So every token has a kind (`records.CLASSES`), with its own best prediction:

    answer_1, answer_2, ...   what was asked for, behind so many hops: certain for who computes it
    random                    a digit, an operation, the first word, and whether another hop comes
    markov                    the next word: a thought cannot help
    syntax                    certain for who reads along (but for how many words there are)

Some texts hold a thought, <think>b2c4</think>, in front of a token: of answers sometimes what would
help, all hops or the first, sometimes dots; of other tokens dots. This is what a model has to learn
thinking from: reinforcement cannot invent the format. Where one begins is not learned: in RLP it is
not the model that says when to think. As a 'question' a segment is a problem with an answer, for
what comes after pretraining.

A world for RLP (Reinforcement as a Pretraining Objective, arXiv 2510.01265); it is not the paper's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

from reasonrl import records
from reasonrl.tasks import splits

FORMS = ('text', 'question')
JUNK = ('.', '!')
OPERATIONS = {'+': lambda x, y: x + y, '*': lambda x, y: x * y}
VARIABLES = 'abcdefgh'
# Two letters that stand in no formula: a consonant and a vowel.
WORDS = tuple(map(''.join, itertools.product('klmnprst', 'iouy')))


@dataclasses.dataclass(frozen=True)
class VarChain:
  """Texts of segments, or segments as questions.

  Raises:
    UserError: a field is out of range.
  """

  seed: int
  form: str  # of FORMS
  modulus: int  # 2 to 10: a value is one digit
  min_hops: int
  max_hops: int  # at most 7
  segments: int  # of a text
  min_words: int  # behind a segment
  max_words: int
  num_words: int  # at most 32; the Markov chain is the same for all seeds
  thought_probability: float  # of a text to hold a thought
  thought_at_answer_probability: float  # of that to stand before an answer; else uniform
  # Of a thought before an answer, and of the solution to a question: all hops, the first one, dots.
  thought_kinds: tuple[float, float, float]
  error_probability: float  # of a hop of it to tell a random digit

  def __post_init__(self):
    bounds = {
      'modulus': (2, 10),
      'min_hops': (1, self.max_hops),
      'max_hops': (1, len(VARIABLES) - 1),
      'segments': (1, 100),
      'min_words': (0, self.max_words),
      'max_words': (0, 1000),
      'num_words': (2, len(WORDS)),
    }
    for name, (least, most) in bounds.items():
      value = getattr(self, name)
      if not least <= value <= most:
        raise records.UserError(f'{name}={value} is not from {least} to {most}')
    if self.form not in FORMS:
      raise records.UserError(f'form={self.form!r} is not one of {", ".join(FORMS)}')
    for name in ('thought', 'thought_at_answer', 'error'):
      value = getattr(self, f'{name}_probability')
      if not 0 <= value <= 1:
        raise records.UserError(f'{name}_probability={value} is not a probability')
    kinds = self.thought_kinds
    if len(kinds) != 3 or min(kinds) < 0 or abs(sum(kinds) - 1) > 1e-6:
      raise records.UserError(f'thought_kinds={kinds}: three probabilities, sum 1')
    for split in splits.SPLITS:
      self.example(split, 0)

  @property
  def symbols(self) -> tuple[str, ...]:
    """Tags, words and dots; the rest is single characters."""
    return (*records.TAGS, *WORDS[: self.num_words], *JUNK)

  @functools.cached_property
  def _chain(self) -> list[list[float]]:
    """Cumulative probabilities of the word behind each word: a few are likely."""
    uniform = random.Random('varchain').random
    rows = []
    for _ in range(self.num_words):
      row = [uniform() ** 6 for _ in range(self.num_words)]
      rows.append(list(itertools.accumulate(x / sum(row) for x in row)))
    return rows

  def example(self, split: str, index: int) -> records.Example:
    """Example `index` of `split`; formulas and words decide the split."""
    uniform = splits.generator(self.seed, split, index).random
    count, asks = (1, True) if self.form == 'question' else (self.segments, False)
    draw = lambda: [
      (*self._formulas(uniform), [] if asks else self._words(uniform)) for _ in range(count)
    ]
    chains = splits.draw(split, draw, key=lambda chains: ''.join(f'{c[0]}{c[2]}' for c in chains))
    build = self._question if asks else self._text
    return records.Example(task='varchain', split=split, index=index, **build(uniform, chains))

  def _formulas(self, uniform) -> tuple[str, list[int]]:
    """'a=3;b=a+4;' and the value of each variable."""
    digit = lambda: int(uniform() * self.modulus)
    values = [digit()]
    text = f'a={values[0]};'
    for hop in range(self.min_hops + int(uniform() * (self.max_hops - self.min_hops + 1))):
      operation, by = splits.choose(uniform, tuple(OPERATIONS)), digit()
      text += f'{VARIABLES[hop + 1]}={VARIABLES[hop]}{operation}{by};'
      values.append(OPERATIONS[operation](values[-1], by) % self.modulus)
    return text, values

  def _question(self, uniform, chains) -> dict:
    ((formulas, values, _),) = chains
    thought = self._thought(uniform, values)
    answer = str(values[-1])
    return {
      'problem': f'{formulas}?{VARIABLES[len(values) - 1]}=',
      'answer': answer,
      'solution': f'<think>{thought}</think><answer>{answer}</answer>',
      'meta': {'hops': len(values) - 1},
    }

  def _text(self, uniform, chains) -> dict:
    pieces, spans, at = [], [], 0  # spans: [first character, one behind the last, kind, trace]

    def put(text, kind, trace=''):
      nonlocal at
      pieces.append(text)
      spans.append([at, at + len(text), kind, trace])
      at += len(text)

    for formulas, values, words in chains:
      hops = len(values) - 1
      # Whether there is another hop is open from the least to the most of them.
      goes_on = lambda n: 'random' if self.min_hops <= n < self.max_hops else 'syntax'
      for n, formula in enumerate(formulas.split(';')[:-1]):
        # a = DIGIT ;   b = a OPERATION DIGIT ;
        put(formula[0], goes_on(n - 1))
        for i, character in enumerate(formula[1:], 1):
          put(character, 'random' if i == len(formula) - 1 or i == 3 else 'syntax')
        put(';', 'syntax')
      put('?', goes_on(hops))
      put(VARIABLES[hops], 'syntax')
      put('=', 'syntax')
      put(str(values[-1]), f'answer_{hops}', trace(values))
      put(';', 'syntax')
      for i, word in enumerate(words):
        put(WORDS[word], 'markov' if i else 'random')
    text, meta = ''.join(pieces), {records.TEXT: records.WHOLE}
    if uniform() >= self.thought_probability:
      meta[records.CLASSES] = spans
    else:
      text, opened = self._with_thought(uniform, chains, pieces, spans)
      meta[records.UNTRAINED] = [[opened, opened + len(records.THINK_OPEN)]]
    return {'problem': '', 'answer': '', 'solution': text, 'meta': meta}

  def _words(self, uniform) -> list[int]:
    """Indices of the words behind a segment."""
    words: list[int] = []
    for _ in range(self.min_words + int(uniform() * (self.max_words - self.min_words + 1))):
      u = uniform()
      first = [(i + 1) / self.num_words for i in range(self.num_words)]
      row = self._chain[words[-1]] if words else first
      words.append(next((i for i, c in enumerate(row) if u < c), self.num_words - 1))
    return words

  def _with_thought(self, uniform, chains, pieces, spans) -> tuple[str, int]:
    """The text with a thought in front of one of its tokens, but not of the first; and where."""
    answers = [i for i, span in enumerate(spans) if span[3]]
    if uniform() < self.thought_at_answer_probability:
      place = splits.choose(uniform, answers)
    else:
      place = 1 + int(uniform() * (len(pieces) - 1))
    if place in answers:
      thought = self._thought(uniform, chains[answers.index(place)][1])
    else:
      thought = self._junk(uniform, 2)
    before, after = ''.join(pieces[:place]), ''.join(pieces[place:])
    return f'{before}<think>{thought}</think>{after}', len(before)

  def _thought(self, uniform, values) -> str:
    """What stands before an answer."""
    u = uniform()
    told = [
      int(uniform() * self.modulus) if uniform() < self.error_probability else value
      for value in values
    ]
    full, first, _ = self.thought_kinds
    if u < full:
      return trace(told)
    if u < full + first:
      return trace(told[:2])
    return self._junk(uniform, 4)

  def _junk(self, uniform, most: int) -> str:
    return ''.join(splits.choose(uniform, JUNK) for _ in range(1 + int(uniform() * most)))


def trace(values) -> str:
  """'b2c4': what every variable but the first is."""
  return ''.join(f'{VARIABLES[i]}{value}' for i, value in enumerate(values) if i)
