"""What is wrong with a recipe and what it will cost, before any weight is loaded."""
