"""The processes of a real federation: coordinator, nodes and neighbourhood service, and what they are given."""
