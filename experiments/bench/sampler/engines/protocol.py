"""One engine, a process of its own with its own packages: JSON lines in, JSON lines out.

A request is {"prompts": [[id, ...], ...], "samples": n, "new": n, "temperature": 0 or 1,
"seed": n}: every prompt gets so many samples of exactly `new` tokens; none ends one. The answer is
{"tokens": [[id, ...], ...], "seconds": s}, samples of a prompt one after the other.
"""

import json
import os
import sys
import time


def serve(generate) -> None:
  """Answers requests with generate(**request) until there are no more."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print is no answer
  print('{}', file=answers, flush=True)  # ready
  for line in sys.stdin:
    request = json.loads(line)
    start = time.perf_counter()
    tokens = generate(**request)
    seconds = time.perf_counter() - start
    print(json.dumps({'tokens': tokens, 'seconds': seconds}), file=answers, flush=True)
