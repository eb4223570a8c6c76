"""Many runs: a grid expanded into jobs, where they run, and the gates between them."""
