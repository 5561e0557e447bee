"""The parameters that a phase starts from, placed on the mesh."""

from __future__ import annotations

import functools
import pathlib

import jax

from reasonrl import checkpoint, phases, records, sharding, wiring
from reasonrl.models import gguf, huggingface


def start(setup: wiring.Setup, model: str):
  """A model's own start: the weights its config names, or random ones; placed on the mesh."""
  network = setup.models[model]
  target = sharding.abstract_params(network, setup.mesh)
  weights = setup.config.models[model].weights
  if not weights:
    key = jax.random.key(setup.config.seed, impl='threefry2x32')
    return jax.jit(network.init, out_shardings=jax.tree.map(lambda x: x.sharding, target))(key)
  folder = pathlib.Path(weights).expanduser()
  found, params = huggingface.read(folder) if folder.is_dir() else gguf.read(weights)
  wrong = [
    f'{name}={value!r}, not {getattr(network, name)!r}'
    for name, value in found.items()
    if getattr(network, name) != value
  ]
  if wrong:
    raise records.UserError(f'{weights!r} needs models.{model}: {"; ".join(wrong)}')

  def put(path, x, to):
    if x.shape != to.shape:
      raise records.UserError(
        f'models.{model}: {sharding.path_of(path)} is {to.shape}, but {weights!r} has {x.shape}'
      )
    return jax.device_put(x.astype(to.dtype), to.sharding)

  return jax.tree_util.tree_map_with_path(put, params, target)


def folder_of(
  setup: wiring.Setup, order, index: int, workdir: pathlib.Path, model: str, source: str
):
  """The folder of a model's parameters from `source`, as phase `index` of the order sees it.

  'previous' is where the last phase that trained this model ended, before any the same as
  'scratch': the model's own start, which is None. The name of a phase means its latest run;
  anything else is a path.
  """
  run = phases.before(order, index, source)
  if source == 'previous':
    sections = [setup.phases[name].section for name, _ in order[:index]]
    runs = [i for i, s in enumerate(sections) if s.trains == model and phases.updates(s)]
    run = max(runs, default=None)
  if run is not None:
    return workdir / 'phases' / phases.kept_name(order, run)
  return None if source in ('scratch', 'previous') else pathlib.Path(source)


@functools.partial(jax.jit, donate_argnums=0)
def follow(theirs, policy, alpha):
  """theirs <- alpha policy + (1 - alpha) theirs   (TR-DPO, arXiv 2404.09656 eq. 5)."""
  return jax.tree.map(lambda t, p: alpha * p + (1 - alpha) * t, theirs, policy)


def init(setup: wiring.Setup, order, index: int, workdir: pathlib.Path, model: str, source: str):
  """A model's parameters from `source`: see `folder_of`."""
  folder = folder_of(setup, order, index, workdir, model, source)
  if folder is None:
    return start(setup, model)
  target = sharding.abstract_params(setup.models[model], setup.mesh)
  return checkpoint.load_params(folder, target)
