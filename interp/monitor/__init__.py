"""Monitorability: whether somebody who reads a model's outputs can tell what shaped its behaviour."""
