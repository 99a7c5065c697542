"""Saliency by masked-activation diffusion: which units of a prompt, of a draft or of the model drive a target.

A *game* gives a number to every set of units that are on; an *estimator* shares that number out among the units.
"""
