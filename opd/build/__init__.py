"""From a recipe to a running system."""
