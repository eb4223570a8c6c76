"""GRPO with the hack direction erased from, or routed out of, the gradient.

`PROJECTED_GRPO_CHECK_SHAPES=1` has beartype check every jaxtyping annotation of the package at call time
(the tests and `just smoke` set it; it costs a few per cent, so long runs leave it off).
"""

import os
import sys
from importlib import import_module
from itertools import pairwise

__version__ = "0.1.0"

# While a module runs under its hook, jaxtyping has whatever is then imported for the first time look for
# bytecode under the hook's name: three thousand modules of libraries would be compiled once more (each time,
# where Python may not write bytecode). So they come first, but for what train.py does without: matplotlib,
# scipy.stats.
BEFORE_THE_HOOK = (
    *("torch", "beartype.door", "beartype.vale", "tyro", "loguru"),
    *("transformers.generation.utils", "transformers.models.qwen3.modeling_qwen3"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
)

if os.environ.get("PROJECTED_GRPO_CHECK_SHAPES") == "1":
    for library in BEFORE_THE_HOOK:
        import_module(library)
    # Both cost what --help has no use for.
    install_import_hook = import_module("jaxtyping").install_import_hook
    iter_modules = import_module("pkgutil").iter_modules
    # What `python -m` runs is loaded past the part of the hook that gives its bytecode a name of its own: a
    # later run without checks would find it and could not load it. So that one module goes unchecked.
    run_by_name = {word for flag, word in pairwise(sys.orig_argv) if flag == "-m"}
    own = [f"{__name__}.{module.name}" for module in iter_modules(__path__)]
    install_import_hook([name for name in own if name not in run_by_name], "beartype.beartype")
