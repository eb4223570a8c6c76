"""The verbs of the hack basis: extract it, and check it on pairs it has not seen."""

from loguru import logger

from projected_grpo.basis_file import HARD_GATE, SOFT_GATE, heldout_json
from projected_grpo.engine.chat import open_chat
from projected_grpo.errors import GATE_FAILED
from projected_grpo.extract_vhack_grad import obtain, pair_grads, select, verify_vhack_heldout
from projected_grpo.options.verbs import ExtractOptions
from projected_grpo.pairs import chosen_pairs
from projected_grpo.results.plots import heldout_histogram
from projected_grpo.runlog import write_json


def extract_verb(options: ExtractOptions) -> int:
    """Extract the hack basis (or check the one that is there) and say what is in it."""
    pairs = chosen_pairs(options.basis)
    chat = open_chat(options.model)
    extraction, path = obtain(chat, pairs, options.basis, options.loss, options.model.model, options.out_dir)
    basis = select(extraction.axes, options.basis.v_hack_k, options.basis.v_hack_drop_bottom_frac)
    axes = sum(len(V) for V in basis.V.values())
    dead = sum(not bool(D.any()) for D in extraction.axes.differences.values())
    print(
        f"{path}: {len(extraction.axes.V)} modules, {dead} with zero norm (must be 0); "
        f"in use: {axes} axes of {len(basis.V)} modules"
    )
    return 0


def verify_verb(options: ExtractOptions) -> int:
    """Do held-out pairs lie hack-ward of the basis? Exit 1 unless over half of the cosines are above 0."""
    pairs = chosen_pairs(options.basis)
    chat = open_chat(options.model)
    loss, model = options.loss, options.model.model
    extraction, path = obtain(chat, pairs, options.basis, loss, model, options.out_dir)
    basis = select(extraction.axes, options.basis.v_hack_k, options.basis.v_hack_drop_bottom_frac)
    held_out = pairs.split()[1]
    length_norm = options.basis.v_hack_length_norm
    grads = pair_grads(chat, held_out, loss, length_norm=length_norm)
    result = verify_vhack_heldout(basis, grads)
    write_json(path.with_suffix(".heldout.json"), heldout_json(result))
    picture = path.with_suffix(".heldout.png")
    heldout_histogram(result, f"{pairs.name} pairs, {model}", picture.with_suffix(""))
    print(
        f"{'PASS' if result.passed else 'FAIL'}: {result.fraction_positive:.3f} of {len(result.cosines)} "
        f"held-out cosines above 0 (must exceed {HARD_GATE:.2f}), mean {result.mean:+.3f}; "
        f"histogram in {picture}"
    )
    if result.mean < SOFT_GATE:
        logger.warning("mean held-out cosine is under {}: the basis generalises weakly", SOFT_GATE)
    return 0 if result.passed else GATE_FAILED
