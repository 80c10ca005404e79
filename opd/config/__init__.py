"""Recipes as typed data."""
