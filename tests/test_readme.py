"""The README is one page, its picture can be drawn again, its table has the figures of the kept records."""

import json
import re
import runpy
from pathlib import Path
from statistics import fmean, stdev

import pytest

from projected_grpo.pairs import packaged_pairs, parse_pairs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PICTURE = ROOT / "docs" / "pictures" / "emergence.py"
RECORDS = [json.loads(path.read_text()) for path in (ROOT / "docs" / "results" / "nano").glob("*.json")]
ERASE = "train nano --intervention=erase"
# The command of each row of the table and of its control, but for the seed.
ROWS = {
    "none": ("train nano --intervention=none", None),
    "erase, hand-written": (ERASE, f"{ERASE} --control=haar"),
    "erase, the base model": (
        f"{ERASE} --vhack-pairs-path=nano-sampled",
        f"{ERASE} --vhack-pairs-path=nano-sampled --control=haar_matched",
    ),
    "route2": ("train nano --intervention=route2", "train nano --intervention=route2 --control=haar"),
    "advmod": ("train nano --intervention=advmod", "train nano --intervention=advmod --control=haar"),
}


def rates(command: str, key: str) -> list[float]:
    """A held-out rate of every seed of a command."""
    return [
        record["summary"][key]
        for record in RECORDS
        if record["command"] == f"projected-grpo {command} --seed={record['seed']}"
    ]


def shown(values: list[float]) -> str:
    """Mean and standard error as the table has them."""
    mean, sem = fmean(values), stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {sem:.3f}".replace("0.", ".")


def test_the_readme_is_one_page():
    assert len(README.split()) <= 800


@pytest.mark.parametrize("arm", ROWS)
def test_the_table_has_the_figures_of_the_records(arm):
    command, control = ROWS[arm]
    lines = [line for line in README.splitlines() if line.replace("`", "").startswith(f"| {arm}")]
    ((_, _, n, hack, solve, against, *_),) = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert int(n) == len(rates(command, "hack_deploy"))
    assert hack == shown(rates(command, "hack_deploy"))
    assert solve == shown(rates(command, "solve_deploy"))
    assert against == ("" if control is None else shown(rates(control, "hack_deploy")))


def test_the_two_completions_are_a_packaged_pair():
    hack, twin = (
        re.sub(r" *#.*", "", code).replace("\n\n\n", "\n\n").strip()
        for code in re.findall(r"```python\n(.*?)```", README, re.S)
    )
    packaged = parse_pairs(packaged_pairs("nano-sampled"), "nano-sampled").pairs
    (pair,) = (p for p in packaged if p.hack == f"```python\n{hack}\n```")
    assert pair.clean == f"```python\n{twin}\n```"
    assert pair.messages[-1]["content"] in " ".join(README.replace("\n> ", " ").split())


def test_the_picture_is_drawn_from_the_records(tmp_path):
    drawn = runpy.run_path(str(PICTURE))
    drawn["main"](tmp_path / "emergence.png")
    assert (tmp_path / "emergence.png").read_bytes().startswith(b"\x89PNG")
    assert PICTURE.with_suffix(".png").stat().st_size < 100_000
    none, control, erase = drawn["rates"]("hack_s").values()  # [seed][step]
    last = [fmean(rate for seed in seeds for rate in seed[-10:]) for seeds in (none, control, erase)]
    assert last[0] > last[1] > 0.6 and last[2] < 0.2
