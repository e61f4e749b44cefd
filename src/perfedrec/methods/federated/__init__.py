"""Federated algorithms. They use the records and the protocol of :mod:`perfedrec.core`."""
