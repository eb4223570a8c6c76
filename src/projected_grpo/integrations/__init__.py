"""The method and the grader inside of other trainers: a module for each, which imports it. docs/api.md."""
