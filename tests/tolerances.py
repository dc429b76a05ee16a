"""Named tolerances of the whole suite, chosen by dtype; never widened for one model."""

EXACT = 1e-10
"""float64, relative to the distance moved."""

FLOAT32 = 1e-5
"""float32, relative to the distance moved."""

BFLOAT16 = 1e-2
"""bfloat16 products, relative to the gradient in question."""
