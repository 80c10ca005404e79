"""Several arms and seeds under one budget: run what is missing, compare with honest intervals, write one report."""
