"""The in-graph sampler: prefill, fork, decode, append, and `generate`, which composes them.

1. `prefill` runs each prompt through the trunk once and fills its cache.
2. `fork` copies rows: the G samples of a prompt start from one prefill.
3. `decode` is one compiled `while_loop` that leaves as soon as every row has stopped.
4. `append` feeds tokens that the policy did not write (tool output, forced text).
5. `generate` takes any number of requests and runs them in waves of `slots` rows; results are
   indexed by request, never by slot.

Between calls a row's last token is pending: the cache holds the tokens before it, and the next
decode step feeds it. So a row is fully described by its tokens, and re-prefilling them gives the
same state.

Randomness: a token's key is fold_in(row key, absolute position), one uniform per token, turned
into a token by inverse CDF. So a draw depends on neither the batch layout nor the device count.
Where a control takes tokens back, the uniforms of their positions are used again.

Left out on purpose: shared-prefix attention, cache segments, compaction, slot refill.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from reasonrl import controls, drawing, ops, records, sharding, types

# Part of every random key; later methods add theirs.
PURPOSES = {
  **{'train': 0, 'eval': 1, 'minibatches': 2, 'shuffle': 3},
  **{'collect': 4, 'hint': 5, 'rationalize': 6},
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Rows being sampled. Opaque outside this file."""

  cache: object
  tokens_BS: jax.Array
  source_BS: jax.Array
  logp_BS: jax.Array
  length_B: jax.Array
  end_B: jax.Array  # a row stops at this length
  stop_B: jax.Array
  key_B: jax.Array  # uint32 [B, 2]
  start_B: jax.Array  # where the completion begins
  numbers: dict  # of the controls: int32 [B] each
  controls: tuple | None  # their states; None until a decode begins them
  kept_BSK: jax.Array | None  # ids each token was drawn from; None until a draw remembers them
  size_B: jax.Array | None  # the largest kept set of a row's tokens, remembered whole or not


def _power_of_two(n: int) -> int:
  """The least power of two that is at least n."""
  return 1 << (n - 1).bit_length()


@functools.partial(jax.jit, static_argnums=(0,))
def _row_keys(seed, folds):
  def one(*parts):
    key = jax.random.key(seed, impl='threefry2x32')
    for part in parts:
      key = jax.random.fold_in(key, part)
    return jax.random.key_data(key)

  return jax.vmap(one)(*folds)


def row_keys(seed, purpose, phase, iteration, step, prompt_R, sample_R, thread_R) -> np.ndarray:
  """uint32 [R, 2]: fold_in over (seed, purpose, phase, iteration, step, prompt id, sample, thread).

  `purpose` is a key of PURPOSES; the arguments ending in _R are integer arrays, the others
  integers.
  """
  fixed = (PURPOSES[purpose], phase, iteration, step)
  folds = np.broadcast_arrays(*fixed, prompt_R, sample_R, thread_R)
  return np.asarray(_row_keys(seed, tuple(np.asarray(f, np.uint32) for f in folds)))


def uniforms(key_B, position_B):
  """One float32 in [0, 1) per row: a function of its key and the absolute position alone."""

  def one(data, position):
    key = jax.random.wrap_key_data(data, impl='threefry2x32')
    return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

  return jax.vmap(one)(key_B, position_B)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """The compiled stages for one model on one mesh. `forbidden` ids are never sampled."""

  model: object
  mesh: Mesh
  forbidden: tuple[int, ...]

  def form(self, temperature: float):
    """Static description of the scores, for `ops`; greedy draws report temperature-1 numbers."""
    model = self.model
    dtype = jnp.dtype(model.compute_dtype)
    return (model.logit_scale, model.final_softcap, temperature or 1.0, dtype)

  @functools.partial(jax.jit, static_argnums=0)
  def layout(self, params):
    """Decode parameters: matrices in the compute dtype, gathered over fsdp; once per rollout."""
    shardings = sharding.param_shardings(params, self.model.decode_sharding_rules, self.mesh)
    dtype = jnp.dtype(self.model.compute_dtype)
    cast = lambda x: x.astype(dtype) if x.ndim > 1 else x
    return jax.lax.with_sharding_constraint(jax.tree.map(cast, params), shardings)

  @functools.partial(jax.jit, static_argnums=(0, 4))
  def prefill(self, params, tokens_BT, length_B, slots: int) -> State:
    """Fills the cache with each row's tokens (right-padded, length >= 1, T <= slots)."""
    B, T = tokens_BT.shape
    if T > slots:
      raise ValueError(f'prefill: {T} tokens do not fit a cache of {slots} slots')
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = (positions < length_B[:, None]).astype(jnp.int32)
    empty = self.model.init_cache(B, slots)
    _, cache = self.model.hidden(
      params, tokens_BT, positions, segments, empty, mesh=self.mesh, fresh=True
    )
    tokens_BT = jnp.where(segments > 0, tokens_BT, 0)
    wide = lambda fill, dtype: jnp.full((B, slots), fill, dtype)
    return self._constrain(
      State(
        cache=cache,
        tokens_BS=wide(0, jnp.int32).at[:, :T].set(tokens_BT),
        source_BS=wide(types.PROMPT, jnp.int8),
        logp_BS=wide(0.0, jnp.float32),
        length_B=length_B,
        end_B=jnp.full(B, slots, jnp.int32),
        stop_B=jnp.full(B, int(records.Stop.RUNNING), jnp.int32),
        key_B=jnp.zeros((B, 2), jnp.uint32),
        start_B=length_B,
        numbers={},
        controls=None,
        kept_BSK=None,
        size_B=None,
      )
    )

  @functools.partial(jax.jit, static_argnums=0)
  def fork(self, state: State, rows_B) -> State:
    """Row i of the result is a copy of row rows_B[i]."""
    cache = jax.tree.map(lambda x: jnp.take(x, rows_B, axis=x.ndim - 4), state.cache)
    rest = jax.tree.map(lambda x: x[rows_B], dataclasses.replace(state, cache=None))
    return self._constrain(dataclasses.replace(rest, cache=cache))

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def assign(self, state: State, key_B, max_new_B, numbers) -> State:
    """Gives rows their keys, the most new tokens each may get, and the numbers of their controls.

    0 new tokens stop a row at once. `numbers`: name -> int32 [B], see `controls`.
    """
    end_B = jnp.minimum(state.length_B + max_new_B, state.tokens_BS.shape[1])
    stop_B = jnp.where(end_B <= state.length_B, int(records.Stop.LENGTH), state.stop_B)
    fields = {'key_B': key_B, 'end_B': end_B, 'stop_B': stop_B, 'numbers': numbers}
    return dataclasses.replace(state, start_B=state.length_B, controls=None, **fields)

  @functools.partial(jax.jit, static_argnums=(0, 3), donate_argnums=2)
  def decode(self, params, state: State, spec: types.Spec, max_new) -> State:
    """Up to max_new more tokens per row. A row that ran out of length may go on; EOS stays."""
    B, S = state.tokens_BS.shape
    most = min(spec.max_kept_tokens, self.model.vocab_size) if spec.truncates else 0
    if most and state.kept_BSK is None:
      empty = {'kept_BSK': jnp.full((B, S, most), -1, jnp.int32), 'size_B': jnp.zeros(B, jnp.int32)}
      state = self._constrain(dataclasses.replace(state, **empty))
    if spec.controls and state.controls is None:
      view = controls.View(state.tokens_BS, state.length_B, state.start_B)
      begun = tuple(control.begin(view) for control in spec.controls)
      state = self._constrain(dataclasses.replace(state, controls=begun))
    if len(spec.controls) != len(state.controls or ()):
      raise ValueError('decode: the controls of a state are those of its first decode')
    running, eos, length = (int(s) for s in records.Stop)
    limit_B = jnp.minimum(state.length_B + max_new, state.end_B)
    may = (state.stop_B != eos) & (state.length_B < limit_B)
    stop_B = jnp.where(state.stop_B == eos, eos, length)
    state = dataclasses.replace(state, stop_B=jnp.where(may, running, stop_B))
    bias_V = ops.forbid(self.model.vocab_size, self.forbidden)
    form, head_VD = self.form(spec.temperature), self.model.head(params)
    rows_B, stop_ids = jnp.arange(B), jnp.asarray(spec.stop_ids, jnp.int32)

    def step(state):
      live = state.stop_B == running
      position_B = state.length_B - 1
      pending_B1 = jnp.take_along_axis(state.tokens_BS, position_B[:, None], axis=1)
      hidden_B1D, cache = self.model.hidden(
        params, pending_B1, position_B[:, None], live[:, None].astype(jnp.int32), state.cache
      )
      z_BV = ops.logits(hidden_B1D[:, 0], head_VD, bias_V, form)
      view = controls.View(state.tokens_BS, state.length_B, state.start_B)
      for control in spec.controls:
        z_BV = control.bias(state.numbers, view, z_BV)
      token_B, logp_B, weight_BV = drawing.draw(z_BV, uniforms(state.key_B, state.length_B), spec)
      (token_B, back_B, written_B), applied = controls.apply(
        spec.controls, state.controls, state.numbers, view, token_B, stop_ids
      )
      applied = jax.tree.map(lambda n, o: jnp.where(live, n, o), applied, state.controls)
      # A stopped row writes outside the array, which drops the write.
      slot_B = jnp.where(live, state.length_B - back_B, S)
      put = lambda x, value: x.at[rows_B, slot_B].set(value, mode='drop')
      length_B = jnp.where(live, slot_B + 1, state.length_B)
      source_B = jnp.where(written_B, types.ENVIRONMENT, types.POLICY).astype(jnp.int8)
      stop_B = jnp.where(live & (length_B >= limit_B), length, state.stop_B)
      is_stop = jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1) & ~written_B
      for control in spec.controls:
        is_stop |= control.stops(view, token_B)
      if most:
        kept_BK, size_B = drawing.kept_ids(weight_BV, most)
        kept_BK = jnp.where(written_B[:, None], -1, kept_BK)
        size_B = jnp.maximum(state.size_B, jnp.where(live & ~written_B, size_B, 0))
        kept_BSK = put(state.kept_BSK, kept_BK)
        state = dataclasses.replace(state, kept_BSK=kept_BSK, size_B=size_B)
      return dataclasses.replace(
        state,
        cache=cache,
        tokens_BS=put(state.tokens_BS, token_B),
        source_BS=put(state.source_BS, source_B),
        logp_BS=put(state.logp_BS, jnp.where(written_B, 0.0, logp_B)),
        controls=applied,
        length_B=length_B,
        stop_B=jnp.where(live & is_stop, eos, stop_B),
      )

    return jax.lax.while_loop(lambda s: jnp.any(s.stop_B == running), step, state)

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
    B, T = tokens_BT.shape
    S = state.tokens_BS.shape[1]
    count_B = jnp.minimum(count_B, S - state.length_B)
    offsets = jnp.broadcast_to(jnp.arange(T), (B, T))
    slots = jnp.where(offsets < count_B[:, None], state.length_B[:, None] + offsets, S)
    put = lambda x, value: x.at[jnp.arange(B)[:, None], slots].set(value, mode='drop')
    tokens_BS = put(state.tokens_BS, tokens_BT)
    # Feed the pending token and all new ones but the last, which becomes the pending one.
    positions = jnp.minimum(state.length_B[:, None] - 1 + offsets, S - 1)
    _, cache = self.model.hidden(
      params,
      jnp.take_along_axis(tokens_BS, positions, axis=1),
      positions,
      (offsets < count_B[:, None]).astype(jnp.int32),
      state.cache,
    )
    return dataclasses.replace(
      state,
      cache=cache,
      tokens_BS=tokens_BS,
      source_BS=put(state.source_BS, jnp.int8(types.ENVIRONMENT)),
      length_B=state.length_B + count_B,
      stop_B=jnp.where(count_B > 0, int(records.Stop.RUNNING), state.stop_B),
    )

  def generate(
    self, params, requests: types.Requests, spec: types.Spec, slots: int, poll: Callable[[], None]
  ) -> types.Samples:
    """Samples every request, `slots` rows at a time (0: all at once); `poll` runs between waves.

    The window is the longest prompt plus the largest max_new, of all processes: they run the same
    programs equally often, however many requests each has.

    Raises:
      UserError: the window is longer than the model's positions, or more ids were kept for a token
        than are to be remembered.
    """
    R, T = requests.prompt_R.size, sharding.agree(requests.tokens_PT.shape[1])
    max_new = sharding.agree(int(requests.max_new_R.max()))
    window, all_rows = T + max_new, sharding.agree(R)
    if window > self.model.max_position:
      raise records.UserError(
        f'prompt of {T} tokens plus max_new {max_new} is longer than the window of the model, '
        f'{self.model.max_position} positions'
      )
    padding = T - requests.tokens_PT.shape[1]
    tokens_PT = np.pad(requests.tokens_PT, ((0, 0), (0, padding)))
    requests = dataclasses.replace(requests, tokens_PT=tokens_PT)
    multiple = sharding.row_multiple(self.mesh)
    slots, few = slots or all_rows, all_rows < slots
    if few:  # how many there are may change from call to call: few shapes, few programs
      slots = min(slots, _power_of_two(all_rows))
    slots += -slots % multiple
    waves = [np.arange(i, min(i + slots, R)) for i in range(0, all_rows, slots)]
    prompts = [np.unique(requests.prompt_R[wave]) for wave in waves]
    most = sharding.agree(max(p.size for p in prompts))
    most = min(slots, _power_of_two(most)) if few else most
    most += -most % multiple
    params, out = self.layout(params), []
    for wave, used in zip(waves, prompts, strict=True):
      poll()
      state = self._start(params, requests, wave, used, slots, most, window)
      state = self.decode(params, state, spec, max_new)
      unused = dict.fromkeys(('cache', 'key_B', 'end_B', 'start_B', 'controls'))
      rows = sharding.fetch_rows(dataclasses.replace(state, **unused, numbers={}))
      out.append(jax.tree.map(lambda x, n=wave.size: x[:n], rows))
    rows = jax.tree.map(lambda *x: np.concatenate(x), *out)
    if rows.size_B is not None:
      met = sharding.agree(int(rows.size_B.max(initial=0)))
      if met > spec.max_kept_tokens:
        raise records.UserError(
          f'a token was drawn from {met} kept tokens, more than max_kept_tokens='
          f'{spec.max_kept_tokens} of the environment: raise it, or keep fewer'
        )
    return types.Samples(
      tokens_RS=rows.tokens_BS,
      prompt_length_R=requests.length_P[requests.prompt_R],
      length_R=rows.length_B,
      source_RS=rows.source_BS,
      logp_RS=rows.logp_BS,
      stop_R=rows.stop_B,
      kept_RSK=rows.kept_BSK,
    )

  def _start(self, params, requests, wave, used, slots, most, window) -> State:
    """One wave: prefill the prompts it uses, fork them to its rows; spare rows are stopped."""
    spare = np.resize(used if used.size else [0], most)  # pad by repeating prompts
    tokens, length = requests.tokens_PT[spare], requests.length_P[spare]
    state = self.prefill(params, *sharding.put_rows((tokens, length), self.mesh), window)
    rows, key = np.zeros(slots, np.int32), np.zeros((slots, 2), np.uint32)
    max_new = np.zeros(slots, np.int32)
    numbers = {name: np.zeros(slots, np.int32) for name in requests.numbers}
    for name, number_R in requests.numbers.items():
      numbers[name][: wave.size] = number_R[wave]
    rows[: wave.size] = np.searchsorted(used, requests.prompt_R[wave])
    rows += jax.process_index() * most  # fork indexes the rows of all processes
    key[: wave.size], max_new[: wave.size] = requests.key_R[wave], requests.max_new_R[wave]
    rows, key, max_new, numbers = sharding.put_rows((rows, key, max_new, numbers), self.mesh)
    return self.assign(self.fork(state, rows), key, max_new, numbers)

  def _constrain(self, state: State) -> State:
    """Rows over data and fsdp, key/value heads over tensor where they divide."""
    batch, heads = types.ROWS, self.model.num_kv_heads % self.mesh.shape['tensor'] == 0

    def place(x, spec):
      return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def cache(x):
      lead = (None,) * (x.ndim - 4)
      return place(x, PartitionSpec(*lead, batch[0], 'tensor' if heads else None))

    rest = jax.tree.map(lambda x: place(x, batch), dataclasses.replace(state, cache=None))
    return dataclasses.replace(rest, cache=jax.tree.map(cache, state.cache))
