"""Guard rails: what is watched, and what is done."""
