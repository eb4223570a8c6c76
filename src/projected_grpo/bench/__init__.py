"""Benchmarks: our figures beside a floor or a rival measured in the same run. Imports everything of a run."""
