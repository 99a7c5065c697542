"""Opaque serial depth: how long a program can think between two interpretable points."""
