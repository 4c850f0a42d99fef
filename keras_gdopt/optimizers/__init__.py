"""First-order optimizers, one algorithm per file."""
