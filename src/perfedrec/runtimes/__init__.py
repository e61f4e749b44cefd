"""Runtimes: the same algorithm in one process (:mod:`perfedrec.runtimes.simulator`) or over Flower."""
