"""Federated unlearning recipes: each turns (who owns what, which objective) into a Schedule."""
