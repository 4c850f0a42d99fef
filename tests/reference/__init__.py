"""Float64 NumPy transcriptions of the published update rules, one file an algorithm.

Each file is named like the algorithm's own and has

- `SLOTS`: the slot names and their initial values,
- `VARIANTS`: the constructor arguments to test the algorithm with,
- `update(theta, g, slots, eta, t, **hyperparameters)`: one update, from the weights
  and slots before it to those after it, with `t` counted from 1.
"""
