"""A page that shows sampled answers token by token: what the teacher thought of each, and what it had read."""
