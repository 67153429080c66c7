"""Attention maps over images."""

# Ways to combine the layers and heads of a map; the last two need more than the weights.
COMPUTED = ("rollout", "gradient")
METHODS = ("mean", "max", *COMPUTED)
