"""Scores of the student's own tokens by other weights or under other views."""
