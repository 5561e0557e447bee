"""Rotary positions (arXiv 2104.09864) and the scalings that stretch them over longer contexts.

1. A function of `SCALINGS` gives one frequency per pair of channels: NumPy float64, constants of
   the compiled program. Pair i of C channels is (x_i, x_{i + C/2}).
2. `rotation` gives cosine and sine of position * frequency, once per forward pass and layer kind.
3. `rotate` turns queries and keys by them.

L is the context that the model was trained on before it was stretched by `factor`. Left out on
purpose: frequencies that depend on the length of the input (dynamic NTK, LongRoPE), rotation of
some channels only, and the `mscale` and `truncate` variants of YaRN.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from reasonrl import records


def default(theta: float, head_dim: int) -> np.ndarray:
  """f_i = theta^(-2i/C), i = 0 .. C/2 - 1, in radians per position."""
  return theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)


def linear(theta: float, head_dim: int, factor: float) -> np.ndarray:
  """f_i / factor: position interpolation (arXiv 2306.15595, section 2.3)."""
  return default(theta, head_dim) / factor


def llama3(
  theta: float, head_dim: int, factor: float, original: int, low: float, high: float
) -> np.ndarray:
  """Pairs of more than `high` turns in L stay, those of less than `low` are divided by `factor`.

  r_i = L f_i / 2 pi,  k_i = clip((r_i - low) / (high - low), 0, 1),
  f'_i = (1 - k_i) f_i / factor + k_i f_i

  The formula is YaRN's (arXiv 2309.00071, eqs. 17, 18, 20) with its alpha, beta named low, high;
  the values are those of Llama 3.1 (arXiv 2407.21783; `apply_scaling` in its published code).
  """
  frequency_c = default(theta, head_dim)
  turns_c = original * frequency_c / (2 * math.pi)
  return _blend(frequency_c, factor, (turns_c - low) / (high - low))


def yarn(
  theta: float, head_dim: int, factor: float, original: int, fast: float, slow: float
) -> np.ndarray:
  """Pairs of more than `fast` turns in L stay, those of less than `slow` are divided by `factor`.

  d(b) = C ln(L / 2 pi b) / (2 ln theta): the index of the pair that turns b times in L,
  first = max(floor d(fast), 0),  last = min(ceil d(slow), C - 1),
  k_i = 1 - clip((i - first) / (last - first), 0, 1),
  f'_i = (1 - k_i) f_i / factor + k_i f_i                        (arXiv 2309.00071, eq. 20)

  The ramp is linear in the index i, as in the authors' code and in transformers; eq. 18 has it
  linear in the number of turns. YaRN's other half is `yarn_amplitude`.
  """

  def index(turns):
    return head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

  first = max(math.floor(index(fast)), 0)
  last = min(math.ceil(index(slow)), head_dim - 1)
  # The authors' 0.001 makes a step of an empty ramp.
  ramp_c = (np.arange(head_dim // 2) - first) / max(last - first, 0.001)
  return _blend(default(theta, head_dim), factor, 1 - ramp_c)


def yarn_amplitude(factor: float) -> float:
  """0.1 ln(factor) + 1, of queries and of keys (arXiv 2309.00071, eqs. 21, 22)."""
  return 0.1 * math.log(factor) + 1


def _blend(frequency_c, factor, kept_c):
  kept_c = np.clip(kept_c, 0, 1)
  return (1 - kept_c) * frequency_c / factor + kept_c * frequency_c


# rope_scaling -> its function, and the decoder's fields that this takes after theta and head_dim.
SCALINGS = {
  'default': (default, ()),
  'linear': (linear, ('rope_factor',)),
  'llama3': (
    llama3,
    (
      'rope_factor',
      'rope_original_max_position',
      'rope_low_freq_factor',
      'rope_high_freq_factor',
    ),
  ),
  'yarn': (
    yarn,
    ('rope_factor', 'rope_original_max_position', 'rope_beta_fast', 'rope_beta_slow'),
  ),
}


def rotation(positions_BT, frequency_c, amplitude: float):
  """Cosine and sine of position * frequency, times amplitude: float32 [B, T, 1, C/2] each."""
  frequency_c = jnp.asarray(frequency_c, jnp.float32)
  angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency_c[None, None, None, :]
  return amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)


def rotate(x_BTHC, cos, sin):
  """Turns the pairs (x_i, x_{i + C/2}) of every head, in float32; `rotation` gives cos and sin."""
  a, b = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHC.dtype)


def check(model) -> None:
  """Raises UserError for rotary switches of a decoder that do not fit together."""
  if model.rope_scaling not in SCALINGS:
    raise records.UserError(
      f'model.rope_scaling={model.rope_scaling!r} is not one of {", ".join(SCALINGS)}'
    )
  _, fields = SCALINGS[model.rope_scaling]
  for name in ('rope_factor', 'rope_original_max_position'):
    value, wanted = getattr(model, name), name in fields
    if (value is None) == wanted or (wanted and value < 1):
      raise records.UserError(
        f'model.rope_scaling={model.rope_scaling!r} takes {name}='
        f'{"a number >= 1" if wanted else None}, not {value}'
      )
  for low, high in (
    ('rope_low_freq_factor', 'rope_high_freq_factor'),
    ('rope_beta_slow', 'rope_beta_fast'),
  ):
    if not 0 < getattr(model, low) < getattr(model, high):
      raise records.UserError(
        f'model.{low}={getattr(model, low)} is not between 0 and {high}={getattr(model, high)}'
      )
  if model.rope_local_theta is not None and model.sliding_window is None:
    raise records.UserError(
      f'model.rope_local_theta={model.rope_local_theta} is of windowed layers, but '
      'sliding_window=None'
    )
