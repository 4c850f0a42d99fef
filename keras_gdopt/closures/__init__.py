"""Optimizers that evaluate the loss themselves."""
