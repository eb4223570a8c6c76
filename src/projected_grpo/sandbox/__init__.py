"""Running untrusted code, and comparing its answers with the right ones.

`host` and `oracle` are the trusted side. `child`, `run`, `contain`, `seccomp` and `encode` are a program of
their own, which needs the standard library alone.
"""
