"""Features over denoising time: sets of activations, probes, sparse autoencoders, and directions with their effects."""
