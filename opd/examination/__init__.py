"""`opd eval`: a model, a run or a server, on a recipe's data or on public suites."""
