"""First-order optimizers, one algorithm a file."""
