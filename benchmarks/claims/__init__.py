"""Published claims about gradient flow at initialisation, as data: each is measured anew."""

from __future__ import annotations

from claims import depth, norms, plain_nets
from claims.claim import Claim

CLAIMS: tuple[Claim, ...] = (*plain_nets.CLAIMS, *depth.CLAIMS, *norms.CLAIMS)
