"""After training: a policy read from a run's files, and the deployed model as a plain transformers folder."""
