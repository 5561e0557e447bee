"""What is good: one file per kind of reward, one row per reward in REWARDS.

A reward is a frozen, picklable dataclass called with (example, completion), or with the lists of a
whole group if its class says `group = True`; it returns a Score or a list of them. It is pure,
takes linear time and raises on no string. `rewarding.Pool` runs it in a process that can be killed.

It may have the methods `answer(completion)`, what that votes for (see `votes`), and `trim(text)`, a
completion up to and including its answer (nobody should learn from what follows); None: no answer.

One that gives credit to single tokens has `gamma`, the discount with which it made returns of it;
0: what it gives is a reward of the token.

One that applies to the rollouts of some environments alone has `needs`, see `offers` in `envs`.

A reward that needs the models (a reward model, an information gain) has instead

    batch(tools, state, experience) -> types.BatchScore

(a tuple will do) and judges all rollouts of an experience in the trainer's process; `tools` and
`state` are those of the environment ('params', 'ema', 'version'; in training also 'ref' if it is
needed), and `tools.score(params, experience.rows)` gives log-probabilities.
"""

from reasonrl.rewards import (
  addition,
  answer,
  commonsenseqa,
  cosine,
  countdown,
  format,
  gsm8k,
  information_gain,
  lcpo,
  next_token,
  overlong,
  repetition,
)

REWARDS = {
  'accuracy': answer.Accuracy,
  'addition': addition.Addition,
  'commonsenseqa': commonsenseqa.CommonsenseQA,
  'countdown': countdown.Countdown,
  'gsm8k': gsm8k.Gsm8k,
  'r1_format': format.R1Format,
  'open_r1_format': format.OpenR1Format,
  'tag_count': format.TagCount,
  'soft_overlong': overlong.SoftOverlong,
  'lcpo': lcpo.LCPO,
  'cosine': cosine.Cosine,
  'information_gain': information_gain.InformationGain,
  'token_match': next_token.TokenMatch,
  'prefix_match': next_token.PrefixMatch,
  'trace': next_token.Trace,
  'repetition': repetition.Repetition,
  'repetition_sparse': repetition.RepetitionSparse,
}
