"""NumPy float64 oracles: plain loops over rows, tokens and channels, as the papers write them.

Nothing here is shared with the library, so an error has to be made twice to go unseen.
The objective of reinforcement learning is in `oracle_grpo`.
"""

from __future__ import annotations

import math

import numpy as np


def scores(
  hidden_MD,
  head_VD,
  targets_M,
  scale=1.0,
  softcap=None,
  temperature=1.0,
  bias_V=None,
  kept_MK=None,
):
  """logp_M and entropy_M of the tempered distribution, restricted to the kept ids (-1: none)."""
  logp_M, entropy_M = [], []
  for m, (hidden_D, target) in enumerate(zip(np.float64(hidden_MD), targets_M, strict=True)):
    z_V = scale * (np.asarray(head_VD, np.float64) @ hidden_D)
    if softcap is not None:
      z_V = softcap * np.tanh(z_V / softcap)
    if bias_V is not None:
      z_V = z_V + np.asarray(bias_V, np.float64)
    z_V = z_V / temperature
    kept = [] if kept_MK is None else [v for v in np.asarray(kept_MK[m]).tolist() if v >= 0]
    if kept:  # a smaller vocabulary
      z_V, target = z_V[kept], kept.index(int(target))
    logp_V = z_V - z_V.max() - np.log(np.exp(z_V - z_V.max()).sum())
    logp_M.append(logp_V[target])
    entropy_M.append(-sum(math.exp(x) * x for x in logp_V))
  return np.array(logp_M), np.array(entropy_M)


def score_gradients(
  hidden_MD,
  head_VD,
  targets_M,
  slope_logp_M,
  slope_entropy_M,
  scale,
  softcap,
  temperature_M,
  bias_V,
):
  """Of sum_m slope_logp_m logp_m + slope_entropy_m entropy_m, by hidden states and head."""
  hidden_MD, head_VD = np.float64(hidden_MD), np.float64(head_VD)
  dhidden_MD, dhead_VD = np.zeros(hidden_MD.shape), np.zeros(head_VD.shape)
  for m, target in enumerate(np.asarray(targets_M)):
    raw_V = scale * (head_VD @ hidden_MD[m])
    capped_V = raw_V if softcap is None else softcap * np.tanh(raw_V / softcap)
    z_V = (capped_V + np.float64(bias_V)) / float(temperature_M[m])
    logp_V = z_V - z_V.max() - np.log(np.exp(z_V - z_V.max()).sum())
    p_V = np.exp(logp_V)
    entropy = -(p_V * logp_V).sum()
    dz_V = float(slope_logp_M[m]) * ((np.arange(len(p_V)) == target) - p_V)
    dz_V -= float(slope_entropy_M[m]) * p_V * (logp_V + entropy)
    draw_V = dz_V * scale / float(temperature_M[m])
    if softcap is not None:
      draw_V *= 1 - (capped_V / softcap) ** 2
    dhidden_MD[m] = draw_V @ head_VD
    dhead_VD += np.outer(draw_V, hidden_MD[m])
  return dhidden_MD, dhead_VD


def rotary_frequency(cfg, i, window):
  """Radians per position of pair i in a layer with this window; `cfg` is read as plain data."""
  C, L, factor = cfg.head_dim, cfg.rope_original_max_position, cfg.rope_factor
  if window is not None and cfg.rope_local_theta is not None:
    return cfg.rope_local_theta ** (-2 * i / C)
  frequency = cfg.rope_theta ** (-2 * i / C)
  if cfg.rope_scaling == 'linear':
    return frequency / factor
  if cfg.rope_scaling == 'llama3':  # by wavelengths, as its authors' code
    wavelength = 2 * math.pi / frequency
    if wavelength < L / cfg.rope_high_freq_factor:
      return frequency
    if wavelength > L / cfg.rope_low_freq_factor:
      return frequency / factor
    width = cfg.rope_high_freq_factor - cfg.rope_low_freq_factor
    smooth = (L / wavelength - cfg.rope_low_freq_factor) / width
    return (1 - smooth) * frequency / factor + smooth * frequency
  if cfg.rope_scaling == 'yarn':  # by counting turns: the last pair that is fast, the first slow
    turns = [L * cfg.rope_theta ** (-2 * j / C) / (2 * math.pi) for j in range(C)]
    first = max([0, *(j for j in range(C) if turns[j] >= cfg.rope_beta_fast)])
    last = min([C - 1, *(j for j in range(C) if turns[j] <= cfg.rope_beta_slow)])
    if first < i < last:
      kept = (last - i) / (last - first)
      return kept * frequency + (1 - kept) * frequency / factor
    return frequency if i <= first else frequency / factor
  return frequency


def rotary_amplitude(cfg, window):
  """What cosine and sine are multiplied by in a layer with this window."""
  if window is not None and cfg.rope_local_theta is not None:
    return 1.0
  if cfg.rope_attention_factor is not None:
    return cfg.rope_attention_factor
  return 1 + 0.1 * math.log(cfg.rope_factor) if cfg.rope_scaling == 'yarn' else 1.0


def numerical_gradient(fn, x, step=1e-5):
  """Central differences of a scalar function of one array."""
  x, out = np.array(x, np.float64), np.zeros(np.shape(x))
  for i in np.ndindex(x.shape):
    x[i] += step
    above = fn(x)
    x[i] -= 2 * step
    out[i] = (above - fn(x)) / (2 * step)
    x[i] += step
  return out


def adamw(params, grads, steps, *, learning_rate, b1, b2, eps, decay, max_norm):
  """Parameters after `steps` of AdamW (arXiv 1711.05101) under the same gradients, clipped by norm.

  params, grads: {name: array}; decay: {name: coefficient}; learning_rate: step -> float.
  """
  params = {k: np.array(v, np.float64) for k, v in params.items()}
  norm = math.sqrt(sum(float((np.float64(g) ** 2).sum()) for g in grads.values()))
  grads = {k: np.float64(g) * min(1.0, max_norm / norm) for k, g in grads.items()}
  m = {k: np.zeros_like(v) for k, v in params.items()}
  v = {k: np.zeros_like(v) for k, v in params.items()}
  for t in range(steps):
    for k in params:
      m[k] = b1 * m[k] + (1 - b1) * grads[k]
      v[k] = b2 * v[k] + (1 - b2) * grads[k] ** 2
      update = (m[k] / (1 - b1 ** (t + 1))) / (np.sqrt(v[k] / (1 - b2 ** (t + 1))) + eps)
      params[k] -= learning_rate(t) * (update + decay[k] * params[k])
  return params
