"""transformers: python transformers_generate.py <folder> <dtype> <'dynamic' or 'static' cache>."""

import os
import sys

import protocol
import torch
import transformers


def main(folder: str, dtype: str, cache: str) -> None:
  torch.set_num_threads(os.cpu_count())
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
  model.generation_config = transformers.GenerationConfig(pad_token_id=0)

  @torch.inference_mode()
  def generate(prompts, samples, new, temperature, seed):
    torch.manual_seed(seed)
    prompts = torch.tensor(prompts).repeat_interleave(samples, 0)
    how = {'do_sample': True, 'top_k': 0} if temperature else {'do_sample': False}
    found = model.generate(
      prompts,
      attention_mask=torch.ones_like(prompts),
      max_new_tokens=new,
      cache_implementation=cache,
      **how,
    )
    return found[:, prompts.shape[1] :].tolist()

  protocol.serve(generate)


if __name__ == '__main__':
  main(*sys.argv[1:])
