"""The student's trainer: packs samples, runs the policy, applies updates, and keeps the weights that others copy."""
