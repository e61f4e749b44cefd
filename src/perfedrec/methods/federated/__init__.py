"""Federated algorithms over the nouns and the protocol of :mod:`perfedrec.core.types`."""
