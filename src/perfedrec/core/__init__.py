"""Nouns, the algorithm protocol, keyed random numbers and errors: what every other room may import."""
