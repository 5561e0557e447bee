"""Where arrays live: one mesh (data x fsdp x tensor), parameters placed by (regex, spec) rules.

1. `make_mesh` builds the mesh, in this one place.
2. `param_shardings` matches every parameter path against rules; an uncovered parameter is an error.
3. Batches are split over data and fsdp; scored tokens over all three axes (see `ops`).
4. With several processes (hosts), each holds its own rows of a batch, in the processes' order.
   `agree` makes a host decision the same everywhere before device programs depend on it; `total`
   and `gather` bring host values together.

`jax.jit` with `NamedSharding` is what used to be called pjit.
"""

from __future__ import annotations

import json
import math
import re

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from reasonrl import records, types


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
  """A mesh of the first data x fsdp x tensor devices; one size may be -1 (all that are left).

  Raises:
    UserError: the sizes do not fit the devices.
  """
  sizes, devices = [data, fsdp, tensor], jax.devices()
  if sizes.count(-1) == 1:
    rest = -math.prod(sizes)
    sizes[sizes.index(-1)] = len(devices) // rest if rest > 0 and len(devices) % rest == 0 else 0
  used = math.prod(sizes)
  if min(sizes) < 1 or used > len(devices) or (jax.process_count() > 1 and used < len(devices)):
    raise records.UserError(
      f'mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices: the '
      'product must not exceed it, -1 takes what divides, and several hosts use every device'
    )
  # Auto: make_mesh defaults to Explicit axes since jax 0.9, under which a product of two sharded
  # operands raises a ShardingTypeError instead of letting the compiler place the collectives.
  auto = (AxisType.Auto,) * 3
  if jax.process_count() == 1:
    return jax.make_mesh(tuple(sizes), types.MESH_AXES, axis_types=auto, devices=devices[:used])
  # make_mesh follows the torus and mixes the processes, but each must hold a stretch of the rows.
  ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
  mesh = Mesh(np.asarray(ordered).reshape(sizes), types.MESH_AXES, axis_types=auto)
  holders = [{d.process_index for d in row} for row in mesh.devices.reshape(-1, sizes[2])]
  if any(len(holder) > 1 for holder in holders) or len(holders) % jax.process_count():
    raise records.UserError(
      f'mesh data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]}: each of the {jax.process_count()} '
      'processes must hold rows of its own, so tensor must divide the devices of a process '
      f'({jax.local_device_count()}) and data x fsdp be a multiple of the processes'
    )
  return mesh


def path_of(key_path) -> str:
  """'layers/00/attn/q/weight' for a key path of jax.tree_util."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def match(path: str, rules, what: str):
  """The value of the first (regex, value) whose regex is found in the path.

  Raises:
    UserError: no rule covers the path.
  """
  for pattern, value in rules:
    if re.search(pattern, path):
      return value
  patterns = [pattern for pattern, _ in rules]
  raise records.UserError(f'{what}: parameter {path!r} is covered by none of {patterns}')


def param_specs(params, rules, mesh: Mesh):
  """PartitionSpec for every leaf; an axis that does not divide a dimension is left out there.

  An entry of a rule is None, a mesh axis or a tuple of mesh axes.
  """

  def divides(axes, n):
    axes = axes if isinstance(axes, tuple) else (axes,)
    return n % math.prod(mesh.shape[a] for a in axes) == 0

  def spec(key_path, leaf):
    if leaf.ndim == 0:  # counters of an optimizer or train state
      return PartitionSpec()
    axes = match(path_of(key_path), rules, 'sharding rules')
    if len(axes) > leaf.ndim:
      raise records.UserError(
        f'sharding rules: {axes} has more axes than {path_of(key_path)} of shape {leaf.shape}'
      )
    fits = [a if a and divides(a, n) else None for a, n in zip(axes, leaf.shape, strict=False)]
    return PartitionSpec(*fits)

  return jax.tree_util.tree_map_with_path(spec, params)


def param_shardings(params, rules, mesh: Mesh):
  """NamedSharding for every leaf of a parameter tree (arrays or ShapeDtypeStructs)."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    param_specs(params, rules, mesh),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def abstract(shapes, rules, mesh: Mesh):
  """ShapeDtypeStructs with the shardings that the rules give: a target to restore or load into."""
  return jax.tree.map(
    lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
    shapes,
    param_shardings(shapes, rules, mesh),
  )


def abstract_params(model, mesh: Mesh):
  """Shapes, dtypes and shardings of a model's parameters, without computing them."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return abstract(shapes, model.sharding_rules, mesh)


def replicated(mesh: Mesh) -> NamedSharding:
  """One whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def put_rows(tree, mesh: Mesh):
  """Host arrays [B, ...] -> device arrays split over data and fsdp (B must be divisible)."""
  sharding = NamedSharding(mesh, types.ROWS)
  with jax.transfer_guard_host_to_device('allow'):  # with several processes JAX calls it implicit
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def row_multiple(mesh: Mesh) -> int:
  """The rows that a process gives to a batch must be a multiple of this."""
  return mesh.shape['data'] * mesh.shape['fsdp'] // jax.process_count()


def fetch(tree):
  """Replicated or scalar device values -> NumPy on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def fetch_rows(tree):
  """Row-split device arrays -> NumPy, only the rows this process put there (see `put_rows`)."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def rows(x):
    # Replicas over the tensor axis hold the same rows: keep one shard for each first row.
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

  return jax.tree.map(rows, tree)


def agree(value: int) -> int:
  """The largest value any process holds: the same answer everywhere."""
  if jax.process_count() == 1:
    return value
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def total(value: float) -> float:
  """The sum over processes: a global denominator from local counts."""
  if jax.process_count() == 1:
    return value
  return math.fsum(gather(value))


def same(value: int, what: str) -> int:
  """The value, which must be every process's.

  Raises:
    UserError: it is not.
  """
  high, low = agree(value), agree_min(value)
  if high != low:
    raise records.UserError(f'{what} is not the same on every host: {low} to {high}')
  return value


def agree_min(value: int) -> int:
  """The smallest value any process holds."""
  return -agree(-value)


def on_all_processes(action):
  """Does something on every process, and waits for all; what one of them refuses stops all."""
  done, refusal = None, ''
  try:
    done = action()
  except records.UserError as error:
    refusal = str(error)
  for told in gather(refusal):
    if told:
      raise records.UserError(told)
  return done


def gather(value) -> list:
  """The value of every process, in their order: anything that JSON can hold, NaN included."""
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  padded = text.ljust(agree(len(text)))
  rows = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
  return [json.loads(row.tobytes()) for row in rows]
