"""The nano study: its arms, its kept records, and the preregistered verdicts on them."""
