"""reasonrl: reasoning by reinforcement learning, in JAX.

The folders kernels/, configs/ and experiments/ lie beside this package in the repository and are
imported as reasonrl.kernels, reasonrl.configs and reasonrl.experiments: their plain names belong to
other projects on PyPI. setup.py maps them when the package is installed; in a bare clone the lines
below do. This module imports no JAX, and neither may anything a reward worker loads.
"""

import pathlib

_HERE = pathlib.Path(__file__).parent
if not (_HERE / 'kernels').exists() and (_HERE.parent / 'kernels' / '__init__.py').exists():
  __path__.append(str(_HERE.parent))
