"""Networks. One file per family; this table is read by `train` alone.

A model is a frozen dataclass of its switches with

    init(key) -> params                      nested dict, per-layer leaves; heads in params['heads']
    hidden(params, tokens_BT | embeds_BTD, positions_BT, segments_BT, cache, prefixes_BT=, mesh=,
      fresh=)
      -> (hidden_BTD, cache)                 see `decoder.Decoder.hidden`
    head(params) -> W_VD                     with `logit_scale` and `final_softcap` as attributes
    with_head(tree, W_VD) -> tree            the same place of a tree of gradients
    embed(params, tokens) -> [..., D]        what stands for tokens at the input
    init_cache(rows, slots, dtype)           `caches.Cache`, for `hidden`
    fused(params) -> params                  the same for decoding, in fewer matrices
    stacked(params) -> params                and with `scan_layers` in one tree for all layers

and the attributes vocab_size, max_position, scan_layers, param_dtype, compute_dtype, sharding_rules
and decode_sharding_rules ((regex, axes), first match).
"""

from reasonrl.models import decoder

MODELS = {'decoder': decoder.Decoder}
