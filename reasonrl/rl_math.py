"""The token-level operations of policy-gradient losses: jnp, elementwise, tested by hand numbers.

They run inside the fused loss, on scored tokens in any layout. Losses are to be minimised. What
belongs to whole rollouts is in `advantages`, what makes one number of many tokens in `aggregation`;
complete algorithms are in `algorithms/`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def log_ratio(logp, old_logp, weight, clamp: float | None = None):
  """log pi - log pi_old, clamped to +- `clamp`, and zeroed where weight is 0 BEFORE any exp.

  mask * exp(x) has a finite value but a NaN gradient where a masked x overflows exp.
  """
  gap = jnp.where(weight > 0, logp - old_logp, 0.0)
  return gap if clamp is None else jnp.clip(gap, -clamp, clamp)


def segment_sum(x_BM, segment_BM, segments: int):
  """On every token the sum of x over the tokens of its segment, below `segments`: [B, M]."""

  def one(x_M, segment_M):
    return jax.ops.segment_sum(x_M, segment_M, segments)[segment_M]

  return jax.vmap(one)(x_BM, segment_BM)


# ------------------------------------------------------------------------------------ surrogates


def ppo_clip(ratio, adv, low: float, high: float, dual_clip: float | None, delta: float | None):
  """-min(r A, clip(r, 1 - low, 1 + high) A)   (arXiv 1707.06347 eq. 7; clip-higher 2503.14476).

  dual_clip c > 1: for A < 0 at most c |A|, with zero gradient beyond (arXiv 1912.09729).
  delta > 1 + high: r <- min(r, delta) in the first branch (arXiv 2505.07291).

  Returns:
    loss, and float32 indicators (clipped low, clipped high) that count a token only where a clipped
    branch is selected and its gradient is zero.
  """
  clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
  bounded = ratio if delta is None else jnp.minimum(ratio, delta)
  loss = -jnp.minimum(bounded * adv, clipped * adv)
  below = (ratio < 1.0 - low) & (adv < 0)
  above = (ratio > 1.0 + high) & (adv > 0)
  for bound in (b for b in (dual_clip, delta) if b is not None):
    above |= (ratio > bound) & (adv < 0)
  if dual_clip is not None:
    loss = jnp.where(adv < 0, jnp.minimum(loss, -dual_clip * adv), loss)
  return loss, below.astype(jnp.float32), above.astype(jnp.float32)


def cispo(logp, ratio, adv, lowest: float | None, highest: float):
  """-sg(clip(r, lowest, highest)) A log pi: clipped tokens keep a gradient (arXiv 2506.13585).

  Both bounds are absolute: TRL's `epsilon_high`; verl's 1 + clip_ratio_high.

  Returns:
    loss, and indicators of ratios below and above, whatever the sign of A.
  """
  weight = jax.lax.stop_gradient(jnp.clip(ratio, lowest, highest))
  below = jnp.zeros_like(ratio) if lowest is None else (ratio < lowest).astype(jnp.float32)
  return -weight * adv * logp, below, (ratio > highest).astype(jnp.float32)


def sapo(ratio, adv, tau_pos: float, tau_neg: float):
  """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A: gradient weight 1 at r = 1.

  (Soft Adaptive Policy Optimization, arXiv 2511.20347.)
  """
  tau = jnp.where(adv > 0, tau_pos, tau_neg)
  return -4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0)) * adv


def vespo_weight(log_w, adv, k_pos: float, lambda_pos: float, k_neg: float, lambda_neg: float):
  """phi(w) = exp(lambda) w^k exp(-lambda w), phi(1) = 1; k and lambda by A >= 0 (arXiv 2602.10693).

  log_w: log of the sequence's product of ratios; here within [log 1e-8, 20]. No gradient.
  """
  log_w = jax.lax.stop_gradient(jnp.clip(log_w, jnp.log(1e-8), 20.0))
  k = jnp.where(adv >= 0, k_pos, k_neg)
  lam = jnp.where(adv >= 0, lambda_pos, lambda_neg)
  return jnp.exp(lam + k * log_w - lam * jnp.exp(log_w))


# ------------------------------------------------------------------------------------ KL


def _k1(d, ratio):
  return -d


def _k2(d, ratio):
  return 0.5 * d**2


def _k3(d, ratio):
  return jnp.expm1(d) - d


def _ratio_k3(d, ratio):
  return ratio * _k3(d, ratio)


def _k3_plus(d, ratio):
  return _k2(d, ratio) + jax.lax.stop_gradient(_k3(d, ratio) - _k2(d, ratio))


# Estimators of KL(pi || pi_ref) from one token, d = log pi_ref - log pi
# (http://joschu.net/blog/kl-approx.html), and the gradient they have in the loss, in expectation
# over tokens drawn from pi: zero, reverse KL, FORWARD KL, reverse KL (also off policy), reverse KL.
KL = {'k1': _k1, 'k2': _k2, 'k3': _k3, 'ratio_k3': _ratio_k3, 'k3_plus': _k3_plus}


def kl(estimator: str, logp, ref_logp, ratio, weight):
  """A key of KL, elementwise; 0 where weight is 0. `ratio`: pi / pi_old, for 'ratio_k3'."""
  return KL[estimator](log_ratio(ref_logp, logp, weight), ratio)
