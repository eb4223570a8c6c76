"""The pair sets of A8 (docs/spec.md), into sets/: `python docs/results/score/make_pairs.py`.

sampled-N-x      N pairs of sampled-197, drawn at random; x tells draws of one size apart
noisy-P-x        48 of them, of which P percent have their sides exchanged
mixed-P-x        24 pairs, of which P percent are of sampled-197 and the others of nano-placebo-iteration
"""

import json
from pathlib import Path
from random import Random

from projected_grpo.pairs import packaged_pairs

HERE = Path(__file__).parent
SETS = HERE / "sets"
SIZES = {"4-a": 4, "4-b": 4, "8-a": 8, "16-a": 16, "32-a": 32, "48-a": 48}
NOISE = {"10-a": 10, "20-a": 20, "30-a": 30, "40-a": 40, "40-b": 40, "50-a": 50, "50-b": 50, "50-c": 50}
SHARES = {"10-a": 10, "25-a": 25, "50-a": 50, "75-a": 75}


def exchanged(pair: dict) -> dict:
    return pair | {"hack": pair["clean"], "clean": pair["hack"]}


def write(name: str, pairs: list[dict], problems: list[dict], said: str) -> None:
    wanted = {pair["problem_id"] for pair in pairs}
    own = [problem for problem in problems if problem["id"] in wanted]
    document = {
        "schema": "projected_grpo.pairs/1",
        "name": name,
        "made_from": said,
        "problems": own,
        "pairs": pairs,
    }
    (SETS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    SETS.mkdir(exist_ok=True)
    sampled = json.loads((HERE / "sampled-197.json").read_text())
    placebo = json.loads(packaged_pairs("nano-placebo-iteration"))
    pairs, problems = sampled["pairs"], sampled["problems"]
    for name, size in SIZES.items():
        write(f"sampled-{name}", Random(f"sampled-{name}").sample(pairs, size), problems, "sampled-197")
    for name, percent in NOISE.items():
        draw = Random(f"noisy-{name}")
        chosen = draw.sample(pairs, 48)
        wrong = set(draw.sample(range(48), round(48 * percent / 100)))
        noisy = [exchanged(pair) if i in wrong else pair for i, pair in enumerate(chosen)]
        write(f"noisy-{name}", noisy, problems, f"sampled-197, sides of {percent}% exchanged")
    for name, percent in SHARES.items():
        draw, count = Random(f"mixed-{name}"), round(24 * percent / 100)
        chosen = draw.sample(pairs, count) + draw.sample(placebo["pairs"], 24 - count)
        said = f"sampled-197, {100 - percent}% of nano-placebo-iteration"
        write(f"mixed-{name}", chosen, problems + placebo["problems"], said)


if __name__ == "__main__":
    main()
