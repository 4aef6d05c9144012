"""Ours beside everything that a user could take instead: see README.md in this folder."""
