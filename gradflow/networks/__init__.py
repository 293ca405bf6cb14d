"""Blocks, norms, wirings and initial weights: from a spec to modules of torch.

A user's own branch may be made of the names below: parts that are empty until gradflow draws their
weights, the branches that blocks are made of, and the norm of a place.
"""

from gradflow.networks.blocks import PHI, Attention, Conv3x3, Ffn, GatedFfn, Linear
from gradflow.networks.norms import Norm, make_norm

__all__ = ["PHI", "Attention", "Conv3x3", "Ffn", "GatedFfn", "Linear", "Norm", "make_norm"]
