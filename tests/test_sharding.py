"""Meshes, rules, placement, and one optimizer step that is the same on every mesh.

That samples do not depend on the mesh is tested with the other layouts in `test_sampling`.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace as types_of

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from reasonrl import learner, optim, packing, records, sampling, sharding, types
from reasonrl.configs import common
from reasonrl.models import decoder

MESHES = {'1x1x1': (1, 1, 1), '8x1x1': (8, 1, 1), '2x2x2': (2, 2, 2)}
TINY = {
  'vocab_size': 24,
  'num_layers': 2,
  'width': 16,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 4,
  'mlp_width': 20,
  'max_position': 32,
}


def make(**changes):
  fields = common.model('nano').to_dict() | TINY | changes
  return decoder.Decoder(**{k: v for k, v in fields.items() if k not in ('kind', 'weights')})


def random_params(model):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), shapes)


# ------------------------------------------------------------------------------------ the mesh


@pytest.mark.parametrize(
  'asked, sizes',
  [
    ((1, 1, 1), (1, 1, 1)),
    ((-1, 1, 1), (8, 1, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 1, -1), (1, 1, 8)),
    ((3, 2, 1), (3, 2, 1)),  # some devices stay idle
  ],
)
def test_make_mesh(asked, sizes):
  mesh = sharding.make_mesh(*asked)
  assert mesh.axis_names == ('data', 'fsdp', 'tensor') == types.MESH_AXES
  assert tuple(mesh.shape.values()) == sizes
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert sharding.row_multiple(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize(
  'asked', [(9, 1, 1), (3, -1, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1), (-1, 0, 1), (-1, -2, 1)]
)
def test_a_mesh_that_does_not_fit(asked):
  data, fsdp, tensor = asked
  message = f'data={data} fsdp={fsdp} tensor={tensor} does not fit 8 devices'
  with pytest.raises(records.UserError, match=message):
    sharding.make_mesh(*asked)


@dataclasses.dataclass(frozen=True)
class Device:
  """Of a torus over which jax.make_mesh would mix the processes."""

  id: int
  process_index: int


@pytest.mark.parametrize(
  'asked, fits', [((-1, 1, 1), True), ((2, 2, 2), True), ((1, 4, 2), True), ((1, 2, 4), False)]
)
def test_each_process_holds_a_stretch_of_the_rows(monkeypatch, asked, fits):
  # Four processes with two devices each, ids across the processes: 0 0 1 1 / 0 0 ... of v6e.
  devices = [Device(i, process) for i, process in enumerate([0, 1, 0, 1, 2, 3, 2, 3])]
  monkeypatch.setattr(sharding.jax, 'devices', lambda: devices)
  monkeypatch.setattr(sharding.jax, 'process_count', lambda: 4)
  monkeypatch.setattr(sharding.jax, 'local_device_count', lambda: 2)
  monkeypatch.setattr(sharding, 'Mesh', lambda array, *_, **__: types_of(devices=array))
  if not fits:
    with pytest.raises(records.UserError, match='tensor must divide the devices of a process .2.'):
      sharding.make_mesh(*asked)
    return
  mesh = sharding.make_mesh(*asked)
  assert [d.process_index for d in mesh.devices.flat] == [0, 0, 1, 1, 2, 2, 3, 3]
  assert [d.id for d in mesh.devices.flat] == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_must_be_the_same_everywhere(monkeypatch):
  assert sharding.same(3, 'x') == 3
  monkeypatch.setattr(sharding, 'agree', lambda value: max(value, 5 if value >= 0 else -3))
  with pytest.raises(records.UserError, match='x is not the same on every host: 3 to 5'):
    sharding.same(3, 'x')


# ------------------------------------------------------------------------------------ rules


def test_the_first_rule_that_is_found_wins():
  rules = ((r'attn/q', 1), (r'q/weight$', 2), (r'', 3))
  assert sharding.match('layers/00/attn/q/weight', rules, 'x') == 1
  assert sharding.match('layers/00/mlp/q/weight', rules, 'x') == 2
  assert sharding.match('embed', rules, 'x') == 3


def test_an_uncovered_parameter_is_an_error():
  mesh = sharding.make_mesh(1, 1, 1)
  params = {'layers': {'00': {'odd': jnp.ones((2, 2))}}}
  with pytest.raises(records.UserError, match=r"sharding rules.*'layers/00/odd'.*none of.*even"):
    sharding.param_specs(params, ((r'even', ()),), mesh)


def test_more_axes_than_dimensions_is_an_error():
  mesh = sharding.make_mesh(1, 1, 1)
  with pytest.raises(records.UserError, match=r'more axes than a of shape \(2,\)'):
    sharding.param_specs({'a': jnp.ones(2)}, ((r'a', ('fsdp', 'tensor')),), mesh)


def test_specs_by_hand():
  mesh = sharding.make_mesh(1, 2, 4)
  leaf = jax.ShapeDtypeStruct
  params = {
    'fits': leaf((8, 6), np.float32),
    'tensor does not divide': leaf((6, 6), np.float32),
    'neither divides': leaf((3, 5), np.float32),
    'fewer axes': leaf((4, 4, 4), np.float32),
    'both': leaf((16, 6), np.float32),
    'both do not divide': leaf((12, 6), np.float32),
    'counter': leaf((), np.int32),  # needs no rule
  }
  rules = (
    (r'both', (('tensor', 'fsdp'),)),
    (r'fewer', ('fsdp',)),
    (r'divide|fits', ('tensor', 'fsdp')),
  )
  assert sharding.param_specs(params, rules, mesh) == {
    'fits': P('tensor', 'fsdp'),
    'tensor does not divide': P(None, 'fsdp'),
    'neither divides': P(None, None),
    'fewer axes': P('fsdp'),
    'both': P(('tensor', 'fsdp')),
    'both do not divide': P(None),
    'counter': P(),
  }
  target = sharding.abstract(params, rules, mesh)['fits']
  assert (target.shape, target.dtype) == ((8, 6), np.float32)
  assert target.sharding == NamedSharding(mesh, P('tensor', 'fsdp'))


def test_paths():
  tree = types.TrainState({'a': [1, {'b': 2}]}, (3,), None, 4)
  paths = [sharding.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  assert paths == ['params/a/0', 'params/a/1/b', 'opt_state/0', 'skipped']


# ------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize('name', MESHES)
def test_rows_go_out_and_come_back(name):
  mesh = sharding.make_mesh(*MESHES[name])
  rows = {'a': np.arange(16).reshape(8, 2), 'b': np.arange(8.0, dtype=np.float32)}
  there = sharding.put_rows(rows, mesh)
  shard = there['a'].addressable_shards[0].data
  assert shard.shape == (8 // sharding.row_multiple(mesh), 2)
  for get in (sharding.fetch, sharding.fetch_rows):
    jax.tree.map(np.testing.assert_array_equal, get(there), rows)


def test_one_process_agrees_with_itself():
  assert sharding.agree(7) == 7 and sharding.total(2.5) == 2.5
  assert sharding.gather({'a': [1.0]}) == [{'a': [1.0]}]


# ------------------------------------------------------------------------------------ placement


def make_learner(model, mesh):
  cfg = optim.Optim(**common.optim(1e-2).to_dict() | {'ema_decay': 0.5})
  return learner.Learner(
    model=model,
    mesh=mesh,
    tx=optim.build(cfg, jax.eval_shape(model.init, jax.random.key(0)), 10),
    ema_decay=cfg.ema_decay,
    terms=(learner.Term(learner.nll, None, 'weight'),),
    form=(1.0, None, 1.0, jnp.dtype('float32')),
    forbidden=(0,),
    loss_backend='auto',
    loss_chunk=8,
  )


@functools.cache
def trained(name):
  """A learner on a mesh, its state after one AdamW step, the reports, and scores before it."""
  mesh, model = sharding.make_mesh(*MESHES[name]), make()
  student = make_learner(model, mesh)
  rng = np.random.default_rng(1)
  length_B = rng.integers(4, 16, 20)
  tokens_BT = rng.integers(1, 24, (20, 16))
  weight_BT = np.ones((20, 16), np.float32)
  weight_BT[:, :2] = 0
  seqs = packing.sequences(tokens_BT, length_B, {'weight': weight_BT})
  batches, _ = packing.pack(seqs, 16, 8, share=True)
  assert len(batches) > 1
  state = student.init(random_params(model))
  placed = sharding.put_rows(batches[0], mesh)
  scores = [np.asarray(x) for x in student.score(state.params, placed)]
  state, reports = student.update(state, batches, [sum(s.index_M.size for s in seqs)])
  return student, state, learner.reduce_reports(reports), scores


def by_path(tree):
  return {sharding.path_of(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_train_state_is_placed_by_the_rules():
  student, state, *_ = trained('2x2x2')
  want = {
    'embed/weight': (P(('tensor', 'fsdp')), (6, 16)),
    'layers/01/attn/q/weight': (P('tensor', 'fsdp'), (8, 8)),
    'layers/01/attn/k/weight': (P('tensor', 'fsdp'), (4, 8)),
    'layers/01/attn/o/weight': (P('fsdp', 'tensor'), (8, 8)),
    'layers/01/mlp/up/weight': (P('tensor', 'fsdp'), (10, 8)),
    'layers/01/mlp/down/weight': (P('fsdp', 'tensor'), (8, 10)),
    'layers/01/attn_norm/scale': (P(), (16,)),
  }
  leaves = by_path(state)
  for path, (spec, shard) in want.items():
    copies = [leaf for name, leaf in leaves.items() if name.endswith(path)]
    assert len(copies) == 4  # parameters, both moments, moving average
    for leaf in copies:
      assert leaf.sharding.is_equivalent_to(NamedSharding(student.mesh, spec), leaf.ndim)
      assert {s.data.shape for s in leaf.addressable_shards} == {shard}
  # What is restored from a checkpoint lands where training left it.
  target = by_path(student.abstract())
  assert target.keys() == leaves.keys()
  for name, leaf in leaves.items():
    assert leaf.sharding.is_equivalent_to(target[name].sharding, leaf.ndim), name


def test_decode_parameters_are_gathered_over_fsdp():
  student, state, *_ = trained('2x2x2')
  decode = by_path(
    sampling.Sampler(student.model, student.mesh, (), **common.sampler()).layout(state.params)
  )
  want = {
    'embed/weight': P('tensor', None),
    'layers/00/attn/q/weight': P('tensor', None),
    'layers/00/attn/o/weight': P(None, 'tensor'),
    'final_norm/scale': P(),
  }
  for path, spec in want.items():
    leaf = decode[path]
    assert leaf.sharding.is_equivalent_to(NamedSharding(student.mesh, spec), leaf.ndim), path


@pytest.mark.parametrize('changes', [{}, {'tied_embeddings': False, 'qkv_bias': True}])
def test_the_decoder_rules_cover_every_parameter(changes):
  """With every optional parameter: an uncovered one would be an error."""
  model = make(qk_norm=True, post_norms=True, **changes)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  for rules in (model.sharding_rules, model.decode_sharding_rules):
    sharding.param_specs(shapes, rules, sharding.make_mesh(2, 2, 2))


# ------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize('name', ['8x1x1', '2x2x2'])
def test_one_step_is_the_same_on_every_mesh(name):
  """Float32: scores and loss within 1e-5, gradients (the first moment) within 1e-6, parameters
  within a hundredth of the step of 1e-2 that AdamW's sign-like first update takes."""
  _, want, want_report, want_scores = trained('1x1x1')
  _, got, report, scores = trained(name)
  for g, t in zip(scores, want_scores, strict=True):
    np.testing.assert_allclose(g, t, atol=1e-5, rtol=1e-5)
  assert report['finite'] == 1.0 and report['tokens'] == want_report['tokens'] > 100
  for key in want_report:
    np.testing.assert_allclose(report[key], want_report[key], rtol=1e-5, err_msg=key)
  start = random_params(make())
  tolerance = {'mu': 1e-6, 'nu': 1e-6}
  for path, t in by_path(want).items():
    g = by_path(got)[path]
    kind = next((k for k in ('mu', 'nu') if f'/{k}/' in path), None)
    np.testing.assert_allclose(g, t, atol=tolerance.get(kind, 1e-4), rtol=1e-5, err_msg=path)
  moved = jax.tree.map(lambda new, old: np.abs(new - old).mean(), want.params, start)
  assert min(jax.tree.leaves(moved)) > 1e-3


def test_fsdp_moves_parameters_and_never_activations():
  """No collective of the gradient carries the sequence length, 17, which no parameter has."""
  model = make(num_layers=1)
  mesh = sharding.make_mesh(1, 8, 1)
  student, rows = make_learner(model, mesh), NamedSharding(mesh, types.ROWS)
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=rows)
  weight = jax.ShapeDtypeStruct((8, 5), np.float32, sharding=rows)
  rows_8T = [leaf(8, 17) for _ in range(4)]
  batch = types.Batch(*rows_8T, leaf(8, 5), leaf(8, 5), {'weight': weight})
  params = student.abstract().params
  denominators = (jax.ShapeDtypeStruct((), np.float32, sharding=sharding.replicated(mesh)),)
  lower = learner.Learner.accumulate.lower
  program = lower(student, params, params, batch, denominators).compile().as_text()
  collective = re.compile(r' (all-\w+|reduce-scatter|collective-permute)\(')
  lines = [line for line in program.splitlines() if collective.search(line)]
  assert len(lines) > 5  # parameters are gathered, gradients are summed
  for line in lines:
    sizes = [int(n) for shape in re.findall(r'f32\[([\d,]+)\]', line) for n in shape.split(',')]
    assert not any(n % 17 == 0 for n in sizes), line
