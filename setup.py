"""Packaging: reasonrl, with the top-level folders installed inside its namespace.

Plain `jax` is required; the accelerator comes as an extra: `pip install -e '.[tpu]'`. The lower
bounds are the oldest versions that the tests passed with, all of them together.
"""

import setuptools

TOP_LEVEL = ('kernels', 'configs', 'experiments')  # their plain names are taken on PyPI

setuptools.setup(
  name='reasonrl',
  version='0.1.0',
  description='Reasoning by reinforcement learning, in JAX',
  python_requires='>=3.11',
  packages=[
    *setuptools.find_packages(include=['reasonrl', 'reasonrl.*']),
    *(
      f'reasonrl.{name}'
      for top in TOP_LEVEL
      for name in setuptools.find_packages(include=[top, f'{top}.*'])
    ),
  ],
  package_dir={f'reasonrl.{top}': top for top in TOP_LEVEL},
  install_requires=[
    'absl-py>=2.1',
    'flax>=0.11.2',
    'grain>=0.2.18',
    'jax>=0.7.2',
    'jinja2>=3.1',
    'matplotlib>=3.9',
    'ml-collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.4',
    'pyyaml>=6',
    'rich>=13.7',
    'sentencepiece>=0.2',
    'tensorstore>=0.1.84',
  ],
  extras_require={
    'tpu': ['jax[tpu]>=0.7.2'],
    'cuda': ['jax[cuda12]>=0.7.2'],  # runs on older drivers than cuda13 does
    # The compilers without the devices: see experiments/ahead_of_time.py.
    'tpu-aot': ['jax[tpu]>=0.11.2'],
    'gpu-aot': [
      'jax-cuda12-pjrt>=0.11.2',
      'jax-cuda12-plugin>=0.11.2',
      'nvidia-cuda-nvcc-cu12',
    ],
    'hf': ['tokenizers>=0.22', 'gguf>=0.19', 'safetensors>=0.5'],
    'gym': ['reasoning-gym>=0.1.25'],
    'sweep': ['optuna>=4'],
    'test': [
      'gguf>=0.19',
      'hypothesis>=6.100',
      'optuna>=4',
      'pytest>=8',
      'pytest-timeout>=2.3',
      'pytest-xdist>=3.6',
      'ruff>=0.9',
      'safetensors>=0.5',
      'setuptools>=70.1',  # the wheel test builds one without the network
      'tokenizers>=0.22',
    ],
  },
)
