"""The processes of a real federation (coordinator, nodes and neighbourhood service), and the files that they need."""
