"""How credit is assigned. One file per algorithm; this table is read by `train` alone.

An algorithm is a frozen dataclass of its settings with

    check(num_generations)       raises UserError for settings that cannot train
    needs                        names of scores that must exist: 'old_logp', 'ref_logp', 'prepare'
    num_iterations, num_minibatches
    keep(experience)             bool [groups], sorted by group id: which groups count
    advantages(experience)       float32 [B, T]
    weights(experience)          float32 [B, T] and the global denominator
    prepare(logp_BM, batch)      more aux arrays; called with a scoring pass if 'prepare' is needed
    token_loss(out, aux)         (loss_M, metrics), elementwise over scored tokens
"""

from reasonrl.algorithms import grpo

ALGORITHMS = {'grpo': grpo.GRPO}
