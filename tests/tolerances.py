"""How far results may be from their reference: the one table of tolerances (reasons: tests/goldens/data/README.md)."""

GOLDEN = {
    "logits": {"atol": 2e-4, "rtol": 0.0},
    "router_logits": {"atol": 1e-4, "rtol": 1e-4},
    "hidden_states": {"atol": 1e-4, "rtol": 1e-4},
    "multipliers": {"atol": 2e-5, "rtol": 0.0},
    "loss": {"atol": 2e-5, "rtol": 0.0},
    "aux_loss": {"atol": 2e-5, "rtol": 0.0},
}
# Largest difference over the largest expected entry, plus an absolute floor.
GOLDEN_GRADIENT = {"relative": 2e-4, "floor": 1e-7}
# Relative to the gradient's L2 norm, plus an absolute floor; the sum column times sqrt(numel).
GOLDEN_DIGEST = {"relative": 2e-4, "floor": 1e-6}

SPARSEMIXER = {
    "float32": {"multipliers": 1e-6, "grad_scores": 2e-6},
    "bfloat16": {"multipliers": 8e-3, "grad_scores": 3e-2},
}

# A fast path against the reference in float32: relative error in the maximum norm, outputs and gradients.
FAST_PATH_FLOAT32 = 1e-5
# The same where both compute in bfloat16, or one does and the other in float32.
FAST_PATH_BFLOAT16 = 2e-2
