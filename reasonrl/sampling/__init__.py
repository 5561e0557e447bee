"""The in-graph sampler: prefill, fork, decode, append; and `generate`, all of it in one program.

1. `prefill` runs each prompt through the trunk once and fills its cache.
2. `fork` copies rows.
3. `decode` runs rows to their ends: see `loop` for how the cache grows and live rows move together.
4. `append` feeds tokens that the policy did not write (tool output, forced text).
5. `generate` takes any number of requests over prompts that are prefilled once. Either all of them
   are rows at once, and the samples of a prompt share its keys and values; or `slots` rows serve
   them, and one that stops takes the next request, with a copy of its prompt's keys and values.
   Results are indexed by request, never by row.

A row's last token is pending: the cache holds the tokens before it, and the next step feeds it. So
a row is fully described by its tokens, re-prefilling them gives the same state (but for controls
that mix embeddings), and no token of a prompt but the last meets the head.

Randomness: a token's key is fold_in(row key, absolute position), one uniform per token, turned
into a token by inverse CDF. So a draw depends on neither the batch layout nor the device count.
Where a control takes tokens back, the uniforms of their positions are used again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from reasonrl import caches, records, sharding, types
from reasonrl.sampling import loop, plan
from reasonrl.sampling import rows as rows_lib
from reasonrl.sampling.loop import uniforms
from reasonrl.sampling.rows import State

__all__ = ['PURPOSES', 'Sampler', 'State', 'row_keys', 'uniforms']

# Part of every random key; later methods add theirs.
PURPOSES = {
  **{'train': 0, 'eval': 1, 'minibatches': 2, 'shuffle': 3},
  **{'collect': 4, 'hint': 5, 'rationalize': 6},
}

PREFILL = 8192  # tokens: enough for every back end's products, whose results take memory


@jax.jit
def _row_keys(key, folds):
  def one(*parts):
    folded = jax.random.wrap_key_data(key, impl='threefry2x32')
    for part in parts:
      folded = jax.random.fold_in(folded, part)
    return jax.random.key_data(folded)

  return jax.vmap(one)(*folds)


def row_keys(seed, purpose, phase, iteration, step, prompt_R, sample_R, thread_R) -> np.ndarray:
  """uint32 [R, 2]: fold_in over (seed, purpose, phase, iteration, step, prompt id, sample, thread).

  `purpose` is a key of PURPOSES; the arguments ending in _R are integer arrays, the others
  integers.
  """
  fixed = (PURPOSES[purpose], phase, iteration, step)
  folds = np.broadcast_arrays(*fixed, prompt_R, sample_R, thread_R)
  key = jax.random.key_data(jax.random.key(seed, impl='threefry2x32'))
  return np.asarray(_row_keys(key, tuple(np.asarray(f, np.uint32) for f in folds)))


@dataclasses.dataclass(frozen=True)
class Sampler:
  """The compiled stages for one model on one mesh.

  Every default and its reason is in `configs/common.py`.
  """

  model: object
  mesh: Mesh
  forbidden: tuple[int, ...]  # ids that are never sampled
  cache_dtype: str  # 'auto': the compute dtype; 'int8'
  segment: int  # slots that a cache begins with; it doubles
  buckets: int  # row counts that live rows may shrink to, the whole included

  def __post_init__(self):
    if self.cache_dtype not in ('auto', 'int8'):
      raise records.UserError(f"sampler.cache_dtype={self.cache_dtype!r} is not 'auto' or 'int8'")
    if self.segment < 1 or self.buckets < 1:
      raise records.UserError(
        f'sampler: segment={self.segment} and buckets={self.buckets} must be at least 1'
      )

  @property
  def dtype(self) -> str:
    """Of keys and values."""
    return self.model.compute_dtype if self.cache_dtype == 'auto' else self.cache_dtype

  def form(self, temperature: float):
    """Static description of the scores, for `ops`; greedy draws report temperature-1 numbers."""
    model = self.model
    dtype = jnp.dtype(model.compute_dtype)
    return (model.logit_scale, model.final_softcap, temperature or 1.0, dtype)

  @functools.partial(jax.jit, static_argnums=0)
  def layout(self, params):
    """Decode parameters: matrices in the compute dtype, gathered over fsdp; once per rollout.

    Layers that are scanned are stacked here, or every step would do it.
    """
    dtype = jnp.dtype(self.model.compute_dtype)
    params = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)
    if self.mesh.shape['tensor'] == 1:
      params = self.model.fused(params)
    shardings = sharding.param_shardings(params, self.model.decode_sharding_rules, self.mesh)
    params = jax.lax.with_sharding_constraint(params, shardings)
    return self.model.stacked(params) if self.model.scan_layers else params

  @functools.partial(jax.jit, static_argnums=(0, 4))
  def prefill(self, params, tokens_BT, length_B, slots: int) -> State:
    """Rows with each prompt in their cache (right-padded, length >= 1), to grow to `slots` tokens.

    Raises:
      ValueError: the tokens do not fit.
    """
    T = tokens_BT.shape[1]
    if T > slots:
      raise ValueError(f'prefill: {T} tokens do not fit a cache of {slots} slots')

    def local(params, tokens_BT, length_B):
      cache = self._prefilled(
        params, tokens_BT, length_B, self._ladder(T + 1, slots + self.segment)[0]
      )
      return rows_lib.of_prompts(cache, tokens_BT, length_B, slots)

    return self._on_rows(local, self._state(), params, tokens_BT, length_B)

  @functools.partial(jax.jit, static_argnums=0)
  def fork(self, state: State, rows_B) -> State:
    """Row i of the result is a copy of row rows_B[i]."""
    of = lambda spec: NamedSharding(self.mesh, spec)
    shardings = jax.tree.map(of, self._state(), is_leaf=lambda x: isinstance(x, PartitionSpec))
    return jax.lax.with_sharding_constraint(rows_lib.take(state, rows_B), shardings)

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def assign(self, state: State, key_B, max_new_B, numbers, temperature_B=None) -> State:
    """Gives rows their keys, the most new tokens each may get, and the numbers of their controls.

    0 new tokens stop a row at once. `numbers`: name -> int32 [B], see `controls`. `temperature_B`:
    float32, in the place of the spec's.
    """
    return rows_lib.assign(state, key_B, max_new_B, numbers, temperature_B)

  @functools.partial(jax.jit, static_argnums=(0, 3), donate_argnums=2)
  def decode(self, params, state: State, spec: types.Spec, max_new) -> State:
    """Up to max_new more tokens per row. A row that ran out of length may go on; EOS stays.

    Raises:
      ValueError: not as many controls as in the first decode of these rows.
    """
    if state.controls is not None and len(spec.controls) != len(state.controls):
      raise ValueError('decode: the controls of a state are those of its first decode')
    now, window = state.cache.position_BS.shape[1], state.tokens_BS.shape[1]
    sizes = [now, *(size for size in self._ladder(now, window + self.segment) if size > now)]

    def local(params, state, max_new_B):
      policy = self._policy(params, spec, wakes=True)
      state = rows_lib.begin(state, params, self.model, spec, max_new_B)
      bucket = loop.buckets(state.stop_B.size, 1, self.buckets)
      return loop.run(policy, state, sizes, bucket, None)[0]

    max_new_B = jnp.full(state.stop_B.shape, max_new, jnp.int32)
    return self._on_rows(local, self._state(), params, state, max_new_B)

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def append(self, params, state: State, tokens_BT, count_B) -> State:
    """Adds count_B tokens to each row as ENVIRONMENT tokens; rows that got any may decode again.

    They count against the most new tokens of a row, as inserted tokens do everywhere: a budget is
    one of context, whoever wrote it (`assign` gives a new one). What does not fit the window is
    dropped; such a row stops with LENGTH at the next decode.

    Raises:
      ValueError: the rows are under controls, which have not seen these tokens.
    """
    if state.controls is not None:
      raise ValueError('append: these rows are under controls, which would not see the new tokens')
    T = tokens_BT.shape[1]
    S = state.tokens_BS.shape[1]

    def local(params, state, tokens_BT, count_B):
      B = count_B.size
      count_B = jnp.minimum(count_B, S - state.length_B)
      offsets = jnp.broadcast_to(jnp.arange(T), (B, T))
      slots = jnp.where(offsets < count_B[:, None], state.length_B[:, None] + offsets, S)
      put = lambda x, value: x.at[jnp.arange(B)[:, None], slots].set(value, mode='drop')
      tokens_BS = put(state.tokens_BS, tokens_BT)
      # Room for all of them in every row, whatever it holds.
      size = max(S + max(T, self.segment), state.cache.position_BS.shape[1])
      cache = caches.tidy(caches.grow(state.cache, size))
      slot = caches.used(cache, jnp.ones(B, bool)).astype(jnp.int32)
      cache = dataclasses.replace(cache, slot=slot)
      # Feed the pending token and all new ones but the last, which becomes the pending one.
      positions = jnp.minimum(state.length_B[:, None] - 1 + offsets, S - 1)
      _, cache = self.model.hidden(
        params,
        jnp.take_along_axis(tokens_BS, positions, axis=1),
        positions,
        (offsets < count_B[:, None]).astype(jnp.int32),
        cache,
        mesh=self.mesh,
      )
      return dataclasses.replace(
        state,
        cache=cache,
        tokens_BS=tokens_BS,
        source_BS=put(state.source_BS, jnp.int8(types.ENVIRONMENT)),
        length_B=state.length_B + count_B,
        stop_B=jnp.where(count_B > 0, rows_lib.RUNNING, state.stop_B),
      )

    return self._on_rows(local, self._state(), params, state, tokens_BT, count_B)

  def generate(
    self, params, requests: types.Requests, spec: types.Spec, slots: int, poll: Callable[[], None]
  ) -> types.Samples:
    """Samples every request with `slots` rows (0: all at once); `poll` runs before each program.

    The window is the longest prompt plus the largest max_new, of all processes: they run the same
    programs equally often, however many requests each has. Prompts of one program take about as
    much memory as its rows at most; if there are more, there are several programs.

    Raises:
      ValueError: no request, on any process.
      UserError: the window is longer than the model's positions, or more ids were kept for a token
        than are to be remembered.
    """
    temperature_R = requests.temperature_R
    if temperature_R is not None and not (spec.temperature > 0 and np.all(temperature_R >= 0)):
      raise records.UserError(
        f'sampling: temperatures by request, {np.unique(temperature_R)}, must be >= 0, and '
        f'temperature={spec.temperature} of the spec above 0'
      )
    if not sharding.agree(requests.prompt_R.size):
      raise ValueError('generate: no requests')
    T = sharding.agree(requests.tokens_PT.shape[1])
    max_new = sharding.agree(int(requests.max_new_R.max(initial=0)))
    window = T + max_new
    if window > self.model.max_position:
      raise records.UserError(
        f'prompt of {T} tokens plus max_new {max_new} is longer than the window of the model, '
        f'{self.model.max_position} positions'
      )
    params, out = self.layout(params), []
    for wave in plan.waves(requests, slots, sharding.row_multiple(self.mesh), T, window):
      poll()
      arrays = sharding.put_rows(wave.arrays, self.mesh)
      done = self._sample(params, arrays, spec, *wave[2:], window)
      rows = sharding.fetch_rows(done)
      out.append((wave, rows))
    R = requests.prompt_R.size
    first = out[0][1]
    rows = {name: np.zeros((R, *x.shape[1:]), x.dtype) for name, x in first.items()}
    for wave, found in out:
      for name, x in found.items():
        rows[name][wave.request[wave.request < R]] = x[wave.request < R]
    if 'size' in rows:
      met = sharding.agree(int(rows['size'].max(initial=0)))
      if met > spec.max_kept_tokens:
        raise records.UserError(
          f'a token was drawn from {met} kept tokens, more than max_kept_tokens='
          f'{spec.max_kept_tokens} of the environment: raise it, or keep fewer'
        )
    return types.Samples(
      tokens_RS=rows['tokens'],
      prompt_length_R=requests.length_P[requests.prompt_R],
      length_R=rows['length'],
      source_RS=rows['source'],
      logp_RS=rows['logp'],
      plain_logp_RS=rows['plain'],
      entropy_RS=rows['entropy'],
      stop_R=rows['stop'],
      kept_RSK=rows.get('kept'),
    )

  @functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6, 7))
  def _sample(
    self, params, arrays, spec, rows: int, width: int, ordered: bool, window: int
  ) -> dict:
    """Requests to their ends. The arguments are what `plan.Wave` has.

    Returns:
      name -> array by request.
    """

    def local(params, arrays):
      policy = self._policy(params, spec, wakes=False)
      tokens_PT, length_P = arrays.tokens_PT, arrays.length_P
      T = tokens_PT.shape[1]
      asked = {'key_B': arrays.key_R, 'max_new_B': arrays.max_new_R, 'numbers': arrays.numbers}
      asked['temperature_B'] = arrays.temperature_R
      bucket = loop.buckets(rows, width, self.buckets)
      prompts = self._prefilled(params, tokens_PT, length_P, T)
      R, requests = arrays.prompt_R.size, loop.Requests(tokens_PT, length_P, arrays.prompt_R, asked)
      all_R = loop.fresh(policy, requests, jnp.arange(R), window)
      sizes = self._ladder(1, window - T)
      own = self._empty(rows, sizes[0])
      if rows == R:
        prompt_Q = None if ordered else arrays.prompt_R[::width]
        cache = caches.share(prompts, length_P - 1, own, prompt_Q)
        done, _ = loop.run(policy, dataclasses.replace(all_R, cache=cache), sizes, bucket, None)
      else:
        nothing_B = jnp.full(rows, R, jnp.int32)
        cache = caches.share(prompts, length_P - 1, own, jnp.zeros(rows // width, jnp.int32))
        queue = loop.Queue(requests, prompts, nothing_B, jnp.int32(0), all_R)
        state = dataclasses.replace(loop.fresh(policy, requests, nothing_B, window), cache=cache)
        done = loop.run(policy, state, sizes, bucket, queue)[1].done
      names = ('tokens_BS', 'source_BS', 'logp_BS', 'plain_BS', 'entropy_BS', 'length_B', 'stop_B')
      names += () if done.kept_BSK is None else ('kept_BSK', 'size_B')
      return {name.rsplit('_')[0]: getattr(done, name) for name in names}

    done = self._on_rows(local, types.ROWS, params, arrays)
    return jax.lax.with_sharding_constraint(done, NamedSharding(self.mesh, types.ROWS))

  # ---------------------------------------------------------------------------------- inside

  def _ladder(self, needed: int, last: int) -> list[int]:
    return loop.ladder(needed, self.segment, last)

  def _policy(self, params, spec, wakes: bool) -> loop.Policy:
    tensor, V = self.mesh.shape['tensor'], self.model.vocab_size
    shards = tensor if V % tensor == 0 else 1  # else the head is whole: see `sharding.param_specs`
    together = ('data', 'fsdp') if self._split and tensor > 1 else ()
    form = self.form(1.0)
    model, mesh = self.model, self.mesh
    return loop.Policy(model, params, self.forbidden, form, spec, mesh, shards, together, wakes)

  @property
  def _split(self) -> bool:
    """Whether rows are split over devices."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp'] > 1

  def _empty(self, rows: int, slots: int) -> caches.Cache:
    return self.model.init_cache(rows, slots, self.dtype)

  def _prefilled(self, params, tokens_PT, length_P, slots: int) -> caches.Cache:
    """The keys and values of prompts, PREFILL tokens in one pass of the trunk."""
    P, T = tokens_PT.shape
    passes = -(-P // max(1, PREFILL // T))
    at_a_time = -(-P // passes)

    def some(tokens_PT, length_P):
      positions = jnp.broadcast_to(jnp.arange(T), tokens_PT.shape)
      segments = (positions < length_P[:, None]).astype(jnp.int32)
      empty = self._empty(tokens_PT.shape[0], slots)
      return self.model.hidden(
        params, tokens_PT, positions, segments, empty, mesh=self.mesh, fresh=True
      )[1]

    if passes == 1:
      return some(tokens_PT, length_P)
    missing = passes * at_a_time - P
    tokens_PT = jnp.pad(tokens_PT, ((0, missing), (0, 0)))
    length_P = jnp.pad(length_P, (0, missing), constant_values=1)

    def fill(i, cache):
      part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * at_a_time, at_a_time)
      at = i * at_a_time + jnp.arange(at_a_time)
      return caches.put(cache, some(part(tokens_PT), part(length_P)), at)

    return jax.lax.fori_loop(0, passes, fill, self._empty(P, slots))

  def _on_rows(self, local, out, params, *args):
    """local(params, *args) on the rows of each device (of each group over the tensor axis).

    `out`: what it returns has these shardings.
    """
    if not self._split:
      return local(params, *args)
    by_row = lambda x: self._state() if isinstance(x, State) else types.ROWS
    return jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(PartitionSpec(), *map(by_row, args)),
      out_specs=out,
      axis_names={'data', 'fsdp'} if self.mesh.shape['tensor'] > 1 else set(self.mesh.axis_names),
      check_vma=False,
    )(params, *args)

  def _state(self) -> State:
    """How a state is split: by rows, behind the layers of a scanned model."""
    cache = PartitionSpec(None, *types.ROWS) if self.model.scan_layers else types.ROWS
    fields = dict.fromkeys((field.name for field in dataclasses.fields(State)), types.ROWS)
    cache = caches.Cache(cache, types.ROWS, PartitionSpec(), cache, types.ROWS)
    return State(**fields | {'cache': cache})
