"""The phases that methods of this package play before training."""

from __future__ import annotations

from perfedrec.core.algorithm import Phase

DEGREES = Phase("degrees", noise="degrees", coordinates=False)
"""Item degrees, as a sum over all clients."""

SPECTRAL = Phase("spectral", noise="spectral", opens="rows")
"""One pass of subspace iteration over all clients."""

SIZES = Phase("sizes")
"""How many users each cluster has, as a sum over all clients. Clusters that are too small are dissolved."""

CLUSTERS = Phase("clusters", opens="basis")
"""One pass over all clients that fills the cluster models."""

JOIN = Phase("join", noise="join", opens="basis")
"""Clients send protected edges to the neighbourhood service, or a first part of the neighbour sums."""
