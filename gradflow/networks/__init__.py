"""Blocks, norms, wirings and initial weights: from a spec to modules of torch."""
