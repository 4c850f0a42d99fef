"""The type of tensors in annotations."""

from typing import Any

Tensor = Any
"""A tensor of the Keras backend in use; TensorFlow's where a file imports TensorFlow."""
