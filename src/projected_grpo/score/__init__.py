"""How well directions separate hacks from the rest, and what erasing them would do, before any training."""
