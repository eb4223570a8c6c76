"""The engine: loading models, batching, decoding, log-probabilities, prompts run once, layers over devices.

Knows the adapter and rollouts; knows nothing of arms, rewards or runs.
"""
