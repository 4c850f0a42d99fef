"""A population on many machines: where members are trained, and what is lost and found."""
