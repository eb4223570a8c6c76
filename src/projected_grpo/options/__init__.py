"""What can be typed: the options of `train` and of the other verbs, parsed before anything large is imported.

Imports settings and problems alone; no torch.
"""
