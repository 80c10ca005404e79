"""A step in a file, and done again from there."""
