"""The methods, federated and centralised, and the registry of their names."""
