"""Making and checking inputs: pairs, pools, graded files, the packaged nano model."""
