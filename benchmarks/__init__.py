"""Side-by-side measurements of the optimizers and their peers, each in one run."""
