"""The TPU back end (Mosaic): logits as [V, R] tiles, the softmax beside the product.

The vocabulary lies along sublanes and the rows along lanes. A tile's sums then need no reduction
across lanes: every sublane keeps (m, l, u) of its own, and the eight merge at the end. Numbers per
row are broadcast along sublanes, which costs nothing.

  forward   grid (row blocks, vocabulary tiles): z = W x^T, online sums; the tile of z is written
            only if a gradient will read it.                                          2RDV FLOPs
  backward  grid (vocabulary tiles), all R rows resident: dz from z, dx^T += W^T dz in on-chip
            memory, dW += dz x in place in HBM, once per chunk.                       4RDV FLOPs

Inside, logits are in units of log 2 (exp2 is the hardware's instruction). Tiles with a bias, and
the last one if the vocabulary ends within it, take a branch of their own; the others do not pay.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from reasonrl.kernels.policy_loss import softmax

SUPPORT = {'plain'}
ROW_MULTIPLE = 512  # rows per iteration of the backward kernel's loop
TIE = 1e-5  # the target's logit is summed in another order than the maximum

SUBLANES = 8
SLAB = 256  # rows whose logits are worked on at a time: the width of the v6e matrix unit
STRIP = 256  # and vocabulary entries, in the forward kernel
TILE = 512  # vocabulary entries per grid step
# Rows per grid step of the forward kernel, the first that divides a chunk: a tile of W is read
# once for all of them.
BLOCKS = (1024, 768, ROW_MULTIPLE)
VMEM = 100 * 2**20  # of the 128 MiB of v5e and v6e; the rest is the compiler's
OUTSIDE = softmax.OUTSIDE
INTERPRET = False  # or InterpretParams, to run without a TPU
LOG2E = math.log2(math.e)


def most_rows(rows: int, D: int, form) -> int:
  """As many of `rows` as the backward kernel can hold in on-chip memory, and at least one block.

  Raises:
    ValueError: not even that fits.
  """
  fits = capacity(D, form)
  if not fits:
    raise ValueError(f'pallas_tpu: a width of {D} does not fit on-chip memory; backend=xla does')
  return min(max(rows, ROW_MULTIPLE), fits)


def capacity(D: int, form) -> int:
  """The most rows of a chunk."""
  size = jnp.dtype(form[3]).itemsize
  words = _tile(TILE, D)
  tile = words * D * (3 * size + 16)  # W twice, W^T, dW in and out twice each
  row = D * (size + 4) + 8 * words + 2 * 4 * 2 * SUBLANES  # x, dx^T, z twice, numbers per row
  return max((VMEM - tile) // row // ROW_MULTIPLE * ROW_MULTIPLE, 0)


def weights(head_VD, bias_V, form):
  """The head in its compute dtype; the bias by tiles, and which tiles have one."""
  V, tile = head_VD.shape[0], _tile(*head_VD.shape)
  bias_1V = jnp.pad(bias_V, (0, -V % tile), constant_values=OUTSIDE)[None]
  special = (bias_1V.reshape(-1, tile) != 0).any(axis=1).astype(jnp.int32)
  return head_VD.astype(form[3]), bias_1V.astype(jnp.float32), special


def forward(weights, hidden_RD, targets_R, support, form, keep: bool):
  """Sums [R], the target's logit [R] (0 where another device has it), and what `backward` reads."""
  (head_VD, bias_1V, special), (scale, softcap, temperature, dtype) = weights, form
  x_RD = hidden_RD.astype(dtype)
  temperature_R = softmax.temperatures(support, temperature, targets_R.shape[0])
  unit_R = LOG2E / temperature_R
  (R, D), V, tile = x_RD.shape, head_VD.shape[0], _tile(*head_VD.shape)
  block = next(n for n in BLOCKS if R % n == 0)
  tiles = special.size
  numbers = pl.BlockSpec((SUBLANES, block), lambda i, j, _: (0, i))
  sums = jax.ShapeDtypeStruct((SUBLANES, R), jnp.float32)
  logits = pl.BlockSpec((tile, block), lambda i, j, _: (j, i))
  flops, size = 2 * R * D * V, dtype.itemsize
  out = pl.pallas_call(
    functools.partial(_forward_kernel, scale=scale, softcap=softcap),
    name='policy_loss_forward',
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(R // block, tiles),
      in_specs=[
        pl.BlockSpec((D, block), lambda i, j, _: (0, i)),
        pl.BlockSpec((tile, D), lambda i, j, _: (j, 0)),
        pl.BlockSpec((1, block), lambda i, j, _: (0, i)),
        pl.BlockSpec((1, tile), lambda i, j, _: (0, j)),
      ],
      out_specs=[numbers] * 3 + [logits] * keep,
    ),
    out_shape=[sums] * 3 + [jax.ShapeDtypeStruct((tiles * tile, R), jnp.float32)] * keep,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops,
      transcendentals=R * V,
      bytes_accessed=size * (R * D + R // block * D * V) + 4 * R * V * keep,
    ),
    interpret=INTERPRET,
  )(special, x_RD.T, head_VD, unit_R[None], bias_1V)
  top, total, moment = out[:3]  # per sublane
  sums = softmax.Sums(top / LOG2E, total, moment / LOG2E)
  sums = softmax.merge(sums, lambda x: x.max(axis=0), functools.partial(_add, axis=0))
  own = jnp.minimum(targets_R, V - 1)
  z_R = (x_RD.astype(jnp.float32) * head_VD[own].astype(jnp.float32)).sum(axis=1) * scale
  z_R = (softmax.cap(z_R, softcap) + bias_1V[0, own]) / temperature_R
  z_R = jnp.where(targets_R < V, z_R, 0.0)
  return sums, z_R, (x_RD, unit_R, *out[3:])


def backward(weights, saved, hidden_RD, targets_R, support, slopes, dhead_VD, form):
  """dhidden_RD (of this part of the vocabulary), and dhead_VD with this chunk's share added."""
  del support, hidden_RD
  (head_VD, bias_1V, _), (x_RD, unit_R, z_VR), (scale, softcap, _, dtype) = weights, saved, form
  (R, D), V, tile = x_RD.shape, head_VD.shape[0], _tile(*head_VD.shape)
  factor_R = scale * unit_R / LOG2E
  numbers = [
    slopes.top * LOG2E,
    slopes.constant * factor_R,
    slopes.linear * factor_R / LOG2E,
    slopes.target * factor_R,
    unit_R,
  ]
  numbers = jnp.stack(numbers + [jnp.zeros(R)] * (SUBLANES - len(numbers)))
  if INTERPRET:  # it cannot alias a buffer that ends within a tile
    dhead_VD = jnp.pad(dhead_VD, ((0, -V % tile), (0, 0)))
  once = pl.Buffered(1)
  size = dtype.itemsize
  dx_DR, dhead_VD = pl.pallas_call(
    functools.partial(_backward_kernel, V=V, softcap=softcap),
    name='policy_loss_backward',
    grid=(z_VR.shape[0] // tile,),
    in_specs=[
      pl.BlockSpec((R, D), lambda j: (0, 0), pipeline_mode=once),
      pl.BlockSpec((tile, R), lambda j: (j, 0)),
      pl.BlockSpec((tile, D), lambda j: (j, 0)),
      pl.BlockSpec((1, tile), lambda j: (0, j)),
      pl.BlockSpec((SUBLANES, R), lambda j: (0, 0), pipeline_mode=once),
      pl.BlockSpec((1, R), lambda j: (0, 0), pipeline_mode=once),
      pl.BlockSpec((tile, D), lambda j: (j, 0)),
    ],
    out_specs=[
      pl.BlockSpec((D, R), lambda j: (0, 0), pipeline_mode=once),
      pl.BlockSpec((tile, D), lambda j: (j, 0)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((D, R), jnp.float32),
      jax.ShapeDtypeStruct(dhead_VD.shape, jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((D, tile), dtype)],
    input_output_aliases={6: 1},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('arbitrary',), vmem_limit_bytes=VMEM + 2**24
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * R * D * V,
      transcendentals=R * V,
      bytes_accessed=4 * R * V + V * D * (size + 8) + R * D * (size + 4),
    ),
    interpret=INTERPRET,
  )(x_RD, z_VR, head_VD, bias_1V, numbers, targets_R[None], dhead_VD)
  return dx_DR.T, dhead_VD[:V]


def _tile(V: int, D: int) -> int:
  most = TILE if D <= 4096 else TILE // 2
  return min(most, V + -V % 16)  # 16: the sublanes of a register of bfloat16


def _add(tree, axis):
  return jax.tree.map(lambda x: x.sum(axis=axis), tree)


def _dot(a, b):
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _column(row_1V, width: int):
  """[1, V] -> [V, width], the same number all along a row."""
  column = jnp.broadcast_to(row_1V, (128, row_1V.shape[1])).T
  return jnp.concatenate([column] * (width // 128), axis=1)


def _forward_kernel(
  special, xT_ref, w_ref, unit_ref, bias_ref, top_ref, total_ref, moment_ref, *z_ref, scale, softcap
):
  j = pl.program_id(1)

  @pl.when(j == 0)
  def _():
    top_ref[...] = jnp.full_like(top_ref, OUTSIDE)
    total_ref[...] = jnp.zeros_like(total_ref)
    moment_ref[...] = jnp.zeros_like(moment_ref)

  tile, block = w_ref.shape[0], xT_ref.shape[1]
  strip = min(STRIP, tile)

  def strips(biased: bool):
    for c in range(0, block, SLAB):
      rows = slice(c, c + SLAB)
      for r in range(0, tile, strip):
        words = slice(r, min(r + strip, tile))
        z = _dot(w_ref[words, :], xT_ref[:, rows])
        unit = unit_ref[:, rows]
        if softcap is None and not biased:
          z = z * (scale * unit)
        else:
          z = softmax.cap(z * scale, softcap)
          if biased:
            bias = _column(bias_ref[:, words], SLAB)
            # What lies behind the end of W may be anything, NaN included.
            z = jnp.where(bias == OUTSIDE, OUTSIDE, (z + bias) * unit)
          else:
            z = z * unit
        if z_ref:
          z_ref[0][words, rows] = z
        z = z.reshape(-1, SUBLANES, SLAB)
        old, old_total = top_ref[:, rows], total_ref[:, rows]
        top = jnp.maximum(old, z.max(axis=0))
        shift, gap = old - top, z - top[None]
        weight, e = jnp.exp2(shift), jnp.exp2(gap)
        moment_ref[:, rows] = weight * (moment_ref[:, rows] + shift * old_total) + (e * gap).sum(0)
        total_ref[:, rows] = weight * old_total + e.sum(0)
        top_ref[:, rows] = top

  pl.when(special[j] == 0)(lambda: strips(False))
  pl.when(special[j] != 0)(lambda: strips(True))


def _backward_kernel(
  x_ref, z_ref, w_ref, bias_ref, numbers_ref, targets_ref, dw_in_ref, dxT_ref, dw_ref, wT_ref,
  *, V, softcap,
):  # fmt: skip
  j = pl.program_id(0)
  tile, R = w_ref.shape[0], x_ref.shape[0]

  @pl.when(j == 0)
  def _():
    dxT_ref[...] = jnp.zeros_like(dxT_ref)

  w = w_ref[...]
  if V % tile:  # behind the end of W dz is 0, but 0 times anything is not
    word = jax.lax.broadcasted_iota(jnp.int32, w.shape, 0) + j * tile
    w = jnp.where(word < V, w, jnp.zeros_like(w))
  wT_ref[...] = w.T
  dw_ref[...] = dw_in_ref[...]

  def dz_of(rows):
    z = z_ref[:, rows]
    top, constant, linear, target, unit = (numbers_ref[i : i + 1, rows] for i in range(5))
    gap = z - top
    dz = -jnp.exp2(gap) * (constant + linear * gap)
    word = jax.lax.broadcasted_iota(jnp.int32, z.shape, 0)
    dz = jnp.where(word == targets_ref[:, rows] - j * tile, dz + target, dz)
    if softcap is not None:
      capped = z / unit - _column(bias_ref[...], SLAB)
      dz = jnp.where(gap < OUTSIDE / 2, 0.0, dz * (1.0 - (capped / softcap) ** 2))
    return dz.astype(x_ref.dtype)

  def rows_of(step, _):
    # The next slab's dz is made while the matrix unit is busy with this one.
    slabs = [
      pl.ds(pl.multiple_of(step * ROW_MULTIPLE + c, SLAB), SLAB)
      for c in range(0, ROW_MULTIPLE, SLAB)
    ]
    dz = dz_of(slabs[0])
    for n, rows in enumerate(slabs):
      following = dz_of(slabs[n + 1]) if n + 1 < len(slabs) else None
      dw_ref[...] += _dot(dz, x_ref[rows, :])
      dxT_ref[:, rows] += _dot(wT_ref[...], dz)
      dz = following
    return 0

  jax.lax.fori_loop(0, R // ROW_MULTIPLE, rows_of, 0)
