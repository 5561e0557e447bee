"""The loop of the sampler: one step for all rows, and which rows run it with how large a cache.

    for slots in the ladder:            the cache grows, a static shape at a time
      while they suffice:
        while a slot is free:           all rows; requests that wait take the place of stopped ones
        for fewer rows:                 once what lives fits them, it moves there
          while a slot is free: step

Every level is a `while_loop` of the one program. A level that is not wanted runs zero times, which,
unlike a `cond`, copies no cache. All of this is on the rows of one device, and devices that hold
other rows go their own ways. Only where a tensor axis puts collectives into a step, which all
devices must reach, they go together: see `Policy.together`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reasonrl import caches, controls, drawing, ops, types
from reasonrl.sampling import rows as rows_lib
from reasonrl.sampling.rows import EOS, LENGTH, State

LEAST_ROWS = 8  # fewer are hardly faster


def uniforms(key_B, position_B):
  """One float32 in [0, 1) per row: a function of its key and the absolute position alone."""

  def one(data, position):
    key = jax.random.wrap_key_data(data, impl='threefry2x32')
    return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

  return jax.vmap(one)(key_B, position_B)


class Policy(NamedTuple):
  """What draws: static but for `params`."""

  model: Any
  params: Any
  forbidden: tuple[int, ...]
  form: tuple  # of the logits at temperature 1, see `ops`
  spec: types.Spec
  mesh: Any
  shards: int  # of the vocabulary, see `drawing`
  together: tuple[str, ...]  # mesh axes over which devices must run the same steps
  wakes: bool  # rows that have stopped may go on some day, so that their caches must stay

  def all(self, holds):
    """Whether it holds on all of those devices."""
    return jax.lax.pmin(holds.astype(jnp.int32), self.together) > 0 if self.together else holds

  def any(self, holds):
    return ~self.all(~holds)

  def needed(self, state: State):
    """bool [B]: rows whose cache must stay."""
    return jnp.ones_like(state.live_B) if self.wakes else state.live_B


def step(policy: Policy, state: State) -> State:
  """One more token for every live row."""
  model, params, forbidden, form, spec, mesh, shards = policy[:7]
  B, S = state.tokens_BS.shape
  rows_B, stop_ids = jnp.arange(B), jnp.asarray(spec.stop_ids, jnp.int32)
  live_B, position_B = state.live_B, state.length_B - 1
  if state.input_BD is None:
    inputs = jnp.take_along_axis(state.tokens_BS, position_B[:, None], axis=1)
  else:
    inputs = state.input_BD[:, None]
  cache, _ = caches.find_slot(state.cache, policy.needed(state))
  hidden_B1D, cache = model.hidden(
    params, inputs, position_B[:, None], live_B[:, None].astype(jnp.int32), cache, mesh=mesh
  )
  bias_V = ops.forbid(model.vocab_size, forbidden)
  plain_BV = z_BV = ops.logits(hidden_B1D[:, 0], model.head(params), bias_V, form)
  view = controls.View(state.tokens_BS, state.length_B, state.start_B)
  for control in spec.controls:
    z_BV = control.bias(state.numbers, view, z_BV)
  u_B = uniforms(state.key_B, state.length_B)
  drawn = drawing.draw(plain_BV, z_BV, u_B, spec, state.temperature_B, shards)
  (token_B, back_B, written_B), applied = controls.apply(
    spec.controls, state.controls, state.numbers, view, drawn.token_B, stop_ids
  )
  input_BD = state.input_BD
  if input_BD is not None:
    mixed_BD = _mixed(policy, applied, state.numbers, view, drawn, token_B)
    input_BD = jnp.where(live_B[:, None], mixed_BD, input_BD)
  applied = jax.tree.map(lambda n, o: jnp.where(live_B, n, o), applied, state.controls)
  view = view._replace(length_B=view.length_B - back_B)  # without what was taken back
  # A stopped row writes outside the array, which drops the write.
  slot_B = jnp.where(live_B, state.length_B - back_B, S)
  put = lambda x, value: x.at[rows_B, slot_B].set(value, mode='drop')
  of_draw = lambda x, value: put(x, jnp.where(written_B, 0.0, value))
  length_B = jnp.where(live_B, slot_B + 1, state.length_B)
  source_B = jnp.where(written_B, types.ENVIRONMENT, types.POLICY).astype(jnp.int8)
  stop_B = jnp.where(live_B & (length_B >= state.limit_B), LENGTH, state.stop_B)
  is_stop_B = jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1) & ~written_B
  for control in spec.controls:
    is_stop_B |= control.stops(view, token_B)
  if state.kept_BSK is not None:
    kept_BK, size_B = drawing.kept_ids(drawn.weight_BV, state.kept_BSK.shape[-1], shards)
    whole_B = written_B if spec.truncates else True | written_B
    if state.temperature_B is not None:  # greedy draws leave nothing out
      whole_B |= state.temperature_B == 0
    kept_BK = jnp.where(whole_B[:, None], -1, kept_BK)
    size_B = jnp.maximum(state.size_B, jnp.where(live_B & ~whole_B, size_B, 0))
    state = dataclasses.replace(state, kept_BSK=put(state.kept_BSK, kept_BK), size_B=size_B)
  return dataclasses.replace(
    state,
    cache=cache,
    tokens_BS=put(state.tokens_BS, token_B),
    source_BS=put(state.source_BS, source_B),
    logp_BS=of_draw(state.logp_BS, drawn.logp_B),
    plain_BS=of_draw(state.plain_BS, drawn.plain_B),
    entropy_BS=of_draw(state.entropy_BS, drawn.entropy_B),
    controls=applied,
    length_B=length_B,
    stop_B=jnp.where(live_B & is_stop_B, EOS, stop_B),
    input_BD=input_BD,
  )


def _mixed(policy: Policy, applied, numbers, view, drawn, token_B):
  """What is fed next: the embedding of the token, or what a control mixes instead."""
  embed = lambda ids: policy.model.embed(policy.params, ids)
  out_BD = embed(token_B)
  for control, state in zip(policy.spec.controls, applied, strict=True):
    if control.MIXES:
      mixes_B, weight_BK, ids_BK = control.mix(state, numbers, view, drawn, token_B)
      mixed_BD = jnp.sum(weight_BK[..., None] * embed(ids_BK).astype(jnp.float32), axis=1)
      out_BD = jnp.where(mixes_B[:, None], mixed_BD.astype(out_BD.dtype), out_BD)
  return out_BD


# ------------------------------------------------------------------------------------ which rows


def ladder(needed: int, segment: int, last: int) -> list[int]:
  """Sizes of a cache that must hold `needed` slots now and `last` in the end.

  `segment` slots, doubled each time; the last step is not shorter than a third, and a multiple of
  16, which products of a CPU need to be fast.
  """
  last = max(1, last) + -max(1, last) % 16
  sizes, size = [], segment
  while 4 * size <= 3 * last:
    if size >= needed:
      sizes.append(size)
    size *= 2
  return [*sizes, last]


def buckets(rows: int, width: int, most: int) -> list[tuple[int, int]]:
  """(rows, rows that share a prefix): all, then halves while there are LEAST_ROWS, `most` in all.

  First fewer rows share each prefix, so that the prefixes stay what they are; then there are fewer.
  """
  out = [(rows, width)]
  for k in range(1, most):
    of = max(1, width >> k)
    few = -(-rows >> k)
    few += -few % of
    if few < LEAST_ROWS or few >= out[-1][0]:
      break
    out.append((few, of))
  return out


class Requests(NamedTuple):
  """R requests over P prompts."""

  tokens_PT: Any
  length_P: Any
  prompt_R: Any
  asked: Any  # of each request, as `rows.assign` takes it


class Queue(NamedTuple):
  """Requests that wait for a row, and what came of those that had one."""

  requests: Requests
  prompts: caches.Cache  # [P, K, T, C]
  request_B: Any  # what a row works on; R = nothing
  next: Any  # the first that waits
  done: State  # by request, without a cache

  @property
  def size(self) -> int:
    """R."""
    return self.requests.prompt_R.size


def run(policy: Policy, state: State, sizes: list[int], bucket: list, queue: Queue | None):
  """All rows to their ends; with a queue, all its requests. Returns both."""
  for size in sizes:
    state = dataclasses.replace(state, cache=caches.grow(state.cache, size))
    state, queue = _segment(policy, state, size, size == sizes[-1], bucket, queue)
  return state, None if queue is None else _collect(state, queue)


def _segment(policy, state, size, last: bool, bucket, queue):
  """Until all rows have stopped, or these slots do not suffice."""

  def fits(state):
    return policy.all(caches.find_slot(state.cache, policy.needed(state))[1])

  def suffice(state):
    """Whether there is a slot, or would be many (in the end: one) if rows were tidy."""
    needs = caches.used(state.cache, policy.needed(state))
    return fits(state) | policy.all(needs < (size if last else 3 * size // 4))

  def fit_bucket(state, i):
    """Whether the live rows do; behind the last bucket: whether there is none."""
    if i == len(bucket):
      return policy.all(~jnp.any(state.live_B))
    rows, width = bucket[i]
    return policy.all(rows_lib.prefixes_needed(state, width) <= rows // width)

  def steps(state, i):
    """Steps until they fit the next bucket."""
    going = lambda state: fits(state) & ~fit_bucket(state, i + 1)
    return jax.lax.while_loop(going, lambda state: step(policy, state), state)

  def going(carry):
    state, queue = carry
    live = policy.any(jnp.any(state.live_B))
    if queue is not None:
      live |= policy.any(queue.next < queue.size)
    return live & suffice(state)

  def visit(carry):
    state, queue = carry
    tidied = lambda state: dataclasses.replace(state, cache=caches.tidy(state.cache))
    state = jax.lax.while_loop(lambda state: ~fits(state), tidied, state)
    if queue is None:
      state = steps(state, 0)
    else:
      state, queue = _serve(policy, state, queue, fits, lambda state: fit_bucket(state, 1))
    for i in range(1, len(bucket)):

      def fewer(state, i=i):
        few, rows_b = rows_lib.compact(state, *bucket[i])
        return rows_lib.put(state, steps(few, i), rows_b)

      def wanted(state, i=i):
        return fits(state) & fit_bucket(state, i) & ~fit_bucket(state, i + 1)

      state = jax.lax.while_loop(wanted, fewer, state)
    return state, queue

  return jax.lax.while_loop(going, visit, (state, queue))


def _serve(policy, state, queue, fits, few):
  """Steps of all rows, those that have stopped being replaced, until the last ones fit fewer."""
  B, R = state.stop_B.size, queue.size
  enough = max(state.cache.width, B // 16)  # replacing has a price: not for every row that stops

  def going(carry):
    state, queue = carry
    return fits(state) & (policy.any(queue.next < R) | ~few(state))

  def visit(carry):
    state, queue = refill(policy, *carry)
    waiting = policy.any(queue.next < R)

    def more(state):
      free = state.cache.width * jnp.sum(_free_groups(state))
      take = (queue.next < R) & (free >= jnp.minimum(enough, R - queue.next))
      return fits(state) & ~jnp.where(waiting, policy.any(take), few(state))

    return jax.lax.while_loop(more, lambda state: step(policy, state), state), queue

  return jax.lax.while_loop(going, visit, (state, queue))


def _free_groups(state: State):
  """bool [Q]: prefixes whose rows have all stopped."""
  return ~jnp.any(state.live_B.reshape(-1, state.cache.width), axis=1)


def _collect(state: State, queue: Queue) -> Queue:
  """What rows that have stopped came to, at the places of their requests."""
  at_B = jnp.where(state.live_B, queue.size, queue.request_B)
  rest = dataclasses.replace(state, cache=None)
  one = lambda done, x: done.at[at_B].set(x, mode='drop')
  return queue._replace(done=jax.tree.map(one, queue.done, rest))


def fresh(policy: Policy, requests: Requests, request_B, window: int) -> State:
  """The first state of these requests (R = nothing), without a cache."""
  take = lambda x: jnp.take(x, request_B, axis=0, mode='clip')
  prompt_B = take(requests.prompt_R)
  prompts = requests.tokens_PT[prompt_B], requests.length_P[prompt_B]
  state = rows_lib.of_prompts(None, *prompts, window)
  state = rows_lib.assign(state, **jax.tree.map(take, requests.asked))
  state = rows_lib.begin(state, policy.params, policy.model, policy.spec, window)
  there_B = request_B < requests.prompt_R.size
  return dataclasses.replace(state, stop_B=jnp.where(there_B, state.stop_B, LENGTH))


def refill(policy: Policy, state: State, queue: Queue) -> tuple[State, Queue]:
  """Requests that wait take the rows of the prefixes that nobody needs."""
  queue = _collect(state, queue)
  R, W, free_Q = queue.size, state.cache.width, _free_groups(state)
  first_Q = queue.next + W * (jnp.cumsum(free_Q) - 1)
  request_QW = first_Q[:, None] + jnp.arange(W)[None]
  request_B = jnp.where(jnp.repeat(free_Q, W), request_QW.reshape(-1), queue.request_B)
  request_B = jnp.minimum(request_B, R).astype(jnp.int32)
  new = fresh(policy, queue.requests, request_B, state.tokens_BS.shape[1])
  free_B = jnp.repeat(free_Q, W)
  state = rows_lib.select(free_B, new, state)
  # The prompts of those that came; each is copied once, whatever the number of rows.
  came_Q = free_Q & (request_B[::W] < R)
  order_Q, came = jnp.argsort(~came_Q, stable=True), jnp.sum(came_Q)
  prompt_Q = jnp.take(queue.requests.prompt_R, request_B[::W], mode='clip')

  def copy(i, shared):
    group = order_Q[i]

    def one(x, prompts):
      axis = x.ndim - 4
      new = jax.lax.dynamic_index_in_dim(prompts, prompt_Q[group], axis)
      at = [0] * x.ndim
      at[axis] = group
      if policy.together:  # other devices may have more
        old = jax.lax.dynamic_slice(x, at, new.shape)
        new = jnp.where(i < came, new, old)
      return jax.lax.dynamic_update_slice(x, new, at)

    return jax.tree.map(one, shared, queue.prompts.own)

  most = jax.lax.pmax(came, policy.together) if policy.together else came
  cache = dataclasses.replace(
    state.cache,
    shared=jax.lax.fori_loop(0, most, copy, state.cache.shared),
    length_Q=jnp.where(free_Q, state.length_B[::W] - 1, state.cache.length_Q),
    position_BS=jnp.where(free_B[:, None], -1, state.cache.position_BS),
  )
  state = dataclasses.replace(state, cache=cache)
  return state, queue._replace(request_B=request_B, next=queue.next + W * came.astype(jnp.int32))
