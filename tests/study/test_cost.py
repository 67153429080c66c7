"""The study of costs: the order of the fusion styles at published shapes, and where they cross."""

from experiments import cost
from vlm_jax.cost.flops import train_flops


def test_cross_attention_is_cheapest_and_unified_dearest_at_the_shapes_of_nvlm():
    """NVLM measured 1.76 and 1.26 times the throughput (table 3)."""
    flops = {kind: train_flops(cfg) for kind, cfg in cost.nvlm_shapes().items()}
    speed = {kind: flops["unified"] / flops[kind] for kind in flops}
    order = sorted(speed, key=speed.get)
    assert order == sorted(cost.PUBLISHED, key=cost.PUBLISHED.get)
    assert 1.9 < speed["cross_attention"] < 2.2
    assert 1.6 < speed["hybrid"] < 1.9


def test_cross_attention_costs_more_for_few_image_tokens_and_less_for_many():
    ratios = [cost.crossing_ratio(tokens, 116, cross_every=1) for tokens in (16, 1024)]
    assert ratios[0] < 0.9 and ratios[1] > 1.5
