"""How experience is made. One file per environment; this table is read by `train` alone.

An environment is a frozen dataclass of its settings with `rollout(tools, state, step) ->
Experience`; `state` holds the named parameter trees ('params', 'ref', ...) and the integer
'version'.
"""

from reasonrl.envs import single_turn

ENVS = {'single_turn': single_turn.SingleTurn}
