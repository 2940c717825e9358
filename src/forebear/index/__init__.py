"""Approximate nearest neighbours over a store: built from it, rebuilt from it, held against it."""
