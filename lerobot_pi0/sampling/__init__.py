"""What happens when the policy acts: the sampler, its linear backends, real-time chunking, action limits."""
