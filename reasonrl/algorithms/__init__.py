"""How credit is assigned. One file per algorithm; this table is read by `train` alone.

An algorithm is a frozen dataclass of its settings with

    check(num_generations, rewards)   raises UserError for settings that cannot train
    needs                        names of scores that must exist: 'old_logp', 'ref_logp'
    num_iterations, num_minibatches
    keep(experience)             which groups count: bool, sorted by group id; None: all
    advantages(experience)       float32 [B, T]
    describe(experience)         metrics of what the host computed
    weights(experience)          float32 [B, T] and the global denominator, 0 for none
    prepare                      None, or (logp_BM, batch) -> more aux arrays, at the price of a
                                 scoring pass
    token_loss(out, aux)         (loss_M, metrics), elementwise over scored tokens
    old_policy, moves            whose probabilities the ratio divides by; whether they are older
"""

from reasonrl.algorithms import grpo

ALGORITHMS = {'grpo': grpo.GRPO}
