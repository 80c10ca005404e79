"""Which teacher, view and supports suit a student, found out before any training."""
