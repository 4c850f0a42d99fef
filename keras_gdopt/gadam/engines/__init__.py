"""How the members of a population are trained: all in one stack, or each as a model."""
