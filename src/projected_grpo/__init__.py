"""GRPO with the hack direction erased from, or routed out of, the gradient.

`PROJECTED_GRPO_CHECK_SHAPES=1` has beartype check every jaxtyping annotation of the package at call time
(the tests and `just smoke` set it; it costs a few per cent, so long runs leave it off).
"""

import os

from jaxtyping import install_import_hook

__version__ = "0.1.0"

if os.environ.get("PROJECTED_GRPO_CHECK_SHAPES") == "1":
    install_import_hook("projected_grpo", "beartype.beartype")
