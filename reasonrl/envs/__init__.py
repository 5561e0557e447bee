"""How experience is made. One file per environment; this table is read by `train` alone.

An environment is a frozen dataclass of its settings with

    rollout(tools, state, step)    -> Experience; `state` holds parameter trees ('params', 'ema',
                                   'ref', ...) and 'version', the optimizer step of 'params'
                                   The group of a rollout is its prompt's place in the batch, or
                                   that of the position in a text.
    describe(experience)           metrics of its own, summed over processes
    fits(setup, example)           raises UserError if nothing can be made of an example
    facts                          keys that it gives the meta of its examples
    offers                         what rewards may need: 'answers', 'scores' or 'said'
    of_texts                       its examples are texts, and their positions the groups
    reads                          roles of the parameters that it needs besides 'params'
    longest(tokenizer, max_prompt) tokens of its longest row
    num_generations, max_completion_length, temperature, top_k, top_p, min_p, max_kept_tokens,
    controls
"""

from reasonrl.envs import next_token, single_turn

ENVS = {'single_turn': single_turn.SingleTurn, 'next_token': next_token.NextToken}
