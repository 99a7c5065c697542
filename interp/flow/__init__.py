"""What flows between denoising steps: which tokens, how far from the end, and through which carrier.

How much of it is needed: `interp.bottleneck_study`, which runs every width under the gentle sampler too.
"""
