"""Forgetting (federated unlearning): a trained model without the influence of some users, and the proof of it."""
