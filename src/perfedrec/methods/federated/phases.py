"""The phases that methods of this package play before training."""

from __future__ import annotations

from perfedrec.core.algorithm import Phase

DEGREES = Phase("degrees", noise="degrees", coordinates=False)
"""Item degrees, as a sum over all clients."""

SPECTRAL = Phase("spectral", noise="spectral")
"""One pass of subspace iteration over all clients."""

CLUSTERS = Phase("clusters")
"""One pass that fills the cluster models. It is played only if the server sees single uploads."""

JOIN = Phase("join", noise="join")
"""Clients send protected edges to the neighbourhood service, or a first part of the neighbour sums."""
