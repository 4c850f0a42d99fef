"""Float64 NumPy transcriptions of the published update rules, one file an algorithm.

Each file is named like the algorithm's own and has

- `VARIANTS`: the constructor arguments to test the algorithm with,
- `slots(**hyperparameters)`: the slot names and their initial values,
- `update(theta, g, slots, eta, t, **hyperparameters)`: one update, from what the
  variable and the slots hold before it to what they hold after it, with `t` counted
  from 1,
- `terms(g, slots, eta, t, **hyperparameters)`: the terms whose sum is the change of the
  variable, against whose size rounding errors are measured.
"""
