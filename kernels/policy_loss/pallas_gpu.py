"""The GPU back end (Triton): logits as [R, V], products by the platform where a gradient is wanted.

  scoring   one kernel, W x^T on the tensor cores with the online sums behind it: programs of BLOCK
            rows and a share of the vocabulary, whose sums merge afterwards. No logit is written.
  gradient  a chunk's logits by the platform's product, the sums in one pass over them (a kernel:
            XLA would read them twice), dz by one fused loop, both its products by the platform.

Compiled for compute capability 9.0 in the tests, and not yet run on one: see
experiments/bench/policy_loss.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from reasonrl.kernels import dense
from reasonrl.kernels.policy_loss import softmax

SUPPORT = {'plain'}
ROW_MULTIPLE = 128
TIE = 1e-5  # when scoring, the target's logit is summed in another order than the maximum

BLOCK, TILE = 128, 256  # rows and vocabulary entries of one product: an accumulator of 128 KiB
DEPTH = 128  # bytes of D per step of it
SHARES = 16  # programs that a block of rows is split over
LANES = 1024  # logits of a row that the pass over them holds at a time
INTERPRET = False  # True: run without a GPU


def most_rows(rows: int, D: int, form) -> int:
  del D, form
  return rows


def weights(head_VD, bias_V, form):
  """The head in its compute dtype, once per call and not per chunk."""
  return head_VD.astype(form[3]), bias_V.astype(jnp.float32)


def forward(weights, hidden_RD, targets_R, support, form, keep: bool):
  """Sums [R], the target's logit [R] (0 where another device has it), and what `backward` reads."""
  (head_VD, bias_V), (scale, softcap, temperature, dtype) = weights, form
  temperature_R = softmax.temperatures(support, temperature, targets_R.shape[0])
  x_RD, V = hidden_RD.astype(dtype), head_VD.shape[0]
  own = jnp.minimum(targets_R, V - 1)
  if keep:
    raw_RV = dense.contract(x_RD, head_VD, (1, 1), dtype)
    sums = _sums(raw_RV, bias_V, temperature_R, scale, softcap)
    raw_R = jnp.take_along_axis(raw_RV, own[:, None], axis=1)[:, 0]
  else:
    raw_RV, sums = None, _scores(x_RD, head_VD, bias_V, temperature_R, scale, softcap)
    raw_R = (x_RD.astype(jnp.float32) * head_VD[own].astype(jnp.float32)).sum(axis=1)
  z_R = (softmax.cap(raw_R * scale, softcap) + bias_V[own]) / temperature_R
  return sums, jnp.where(targets_R < V, z_R, 0.0), (x_RD, raw_RV, temperature_R)


def backward(weights, saved, hidden_RD, targets_R, support, slopes, dhead_VD, form):
  """dhidden_RD (of this part of the vocabulary), and dhead_VD with this chunk's share added."""
  del support, hidden_RD
  (head_VD, bias_V), (x_RD, raw_RV, temperature_R) = weights, saved
  scale, softcap, _, dtype = form
  capped_RV = softmax.cap(raw_RV * scale, softcap)
  z_RV = (capped_RV + bias_V[None]) / temperature_R[:, None]
  hit_RV = jnp.arange(z_RV.shape[1])[None] == targets_R[:, None]
  dz_RV = softmax.dlogits(z_RV, hit_RV, slopes, 1) * (scale / temperature_R)[:, None]
  if softcap is not None:
    dz_RV = dz_RV * (1.0 - (capped_RV / softcap) ** 2)
  dz_RV = dz_RV.astype(dtype)
  dhead_VD = dhead_VD + dense.contract(dz_RV, x_RD, (0, 0), dtype)
  return dense.contract(dz_RV, head_VD, (1, 0), dtype), dhead_VD


def _tempered(raw, bias, unit, inside, scale, softcap):
  return jnp.where(inside, (softmax.cap(raw * scale, softcap) + bias) * unit, softmax.OUTSIDE)


def _scores(x_RD, head_VD, bias_V, temperature_R, scale, softcap):
  (R, D), V = x_RD.shape, head_VD.shape[0]
  shares = min(SHARES, pl.cdiv(V, TILE))
  out = jax.ShapeDtypeStruct((shares, R), jnp.float32)
  out = pl.pallas_call(
    functools.partial(
      _scores_kernel, tiles=pl.cdiv(V, TILE * shares), D=D, V=V, scale=scale, softcap=softcap
    ),
    name='policy_loss_scores',
    grid=(R // BLOCK, shares),
    in_specs=[
      pl.BlockSpec((BLOCK, D), lambda i, s: (i, 0)),
      pl.BlockSpec(None),
      pl.BlockSpec(None),
      pl.BlockSpec((BLOCK,), lambda i, s: (i,)),
    ],
    out_specs=[pl.BlockSpec((1, BLOCK), lambda i, s: (s, i))] * 3,
    out_shape=[out] * 3,
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
    interpret=INTERPRET,
  )(x_RD, head_VD, bias_V, 1.0 / temperature_R)
  return softmax.merge(
    softmax.Sums(*out),
    lambda x: x.max(axis=0),
    lambda tree: jax.tree.map(lambda x: x.sum(axis=0), tree),
  )


def _scores_kernel(
  x_ref, w_ref, bias_ref, unit_ref, top_ref, total_ref, moment_ref, *, tiles, D, V, scale, softcap
):
  depth = DEPTH // x_ref.dtype.itemsize
  precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
  unit, share = unit_ref[...][:, None], pl.program_id(1)

  def tile(j, sums):
    first = (share * tiles + j) * TILE
    words = first + jnp.arange(TILE)

    def step(k, raw):
      columns = (k * depth + jnp.arange(depth) < D)[None, :]
      at = pl.ds(k * depth, depth)
      x = triton.load(x_ref.at[:, at], mask=jnp.broadcast_to(columns, (BLOCK, depth)), other=0)
      inside = (words < V)[:, None] & columns
      w = triton.load(w_ref.at[pl.ds(first, TILE), at], mask=inside, other=0)
      dims = (((1,), (1,)), ((), ()))
      return raw + jax.lax.dot_general(
        x, w, dims, precision=precision, preferred_element_type=jnp.float32
      )

    zeros = jnp.zeros((BLOCK, TILE), jnp.float32)
    raw = jax.lax.fori_loop(0, pl.cdiv(D, depth), step, zeros)
    bias = triton.load(bias_ref.at[pl.ds(first, TILE)], mask=words < V, other=0.0)
    z = _tempered(raw, bias[None, :], unit, (words < V)[None, :], scale, softcap)
    return softmax.more(sums, z, 1)

  sums = jax.lax.fori_loop(0, tiles, tile, softmax.none((BLOCK,)))
  top_ref[0, :], total_ref[0, :], moment_ref[0, :] = sums


def _sums(raw_RV, bias_V, temperature_R, scale, softcap):
  R, V = raw_RV.shape
  number = pl.BlockSpec((1,), lambda i: (i,))
  out = pl.pallas_call(
    functools.partial(_sums_kernel, V=V, scale=scale, softcap=softcap),
    name='policy_loss_sums',
    grid=(R,),
    in_specs=[pl.BlockSpec((1, V), lambda i: (i, 0)), pl.BlockSpec(None), number],
    out_specs=[number] * 3,
    out_shape=[jax.ShapeDtypeStruct((R,), jnp.float32)] * 3,
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
    interpret=INTERPRET,
  )(raw_RV, bias_V, 1.0 / temperature_R)
  return softmax.Sums(*out)


def _sums_kernel(raw_ref, bias_ref, unit_ref, top_ref, total_ref, moment_ref, *, V, scale, softcap):
  """Every lane has sums of its own, which merge at the end."""

  def step(j, sums):
    inside = j * LANES + jnp.arange(LANES) < V
    at = pl.ds(j * LANES, LANES)
    raw = triton.load(raw_ref.at[:, at], mask=inside[None], other=0.0)[0]
    bias = triton.load(bias_ref.at[at], mask=inside, other=0.0)
    return softmax.more(sums, _tempered(raw, bias, unit_ref[0], inside, scale, softcap), None)

  lanes = jax.lax.fori_loop(0, pl.cdiv(V, LANES), step, softmax.none((LANES,)))
  add = lambda tree: jax.tree.map(jnp.sum, tree)
  top_ref[0], total_ref[0], moment_ref[0] = softmax.merge(lanes, jnp.max, add)
