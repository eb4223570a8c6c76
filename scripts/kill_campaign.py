"""Kill a small run at random moments, go on with --resume=auto, compare with the run that was not killed.

Half of the kills come by a timer, anywhere from the set-up to the last evaluation. The other half strike in
the middle of writing: at a random one of the process's fsyncs, renames, deletions and openings of logs.
Processes are forked from one that has imported everything, since importing takes most of a small run's time.

    python scripts/kill_campaign.py --kills 200 --out docs/results/kill_campaign.json
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from projected_grpo.cli import main
from projected_grpo.run.checkpoint import state_paths
from projected_grpo.run.resume import age
from projected_grpo.runlog import git_commit, write_json

TIMINGS = ("gen", "fb", "t_rew", "sec")
SAVE_EVERY, STEPS = 2, 6
OPTIONS = (
    *("--n-problems=6", "--eval-n-prompts=1", "--max-new=8", "--workers=1", "--device=cpu", "--group=3"),
    *("--vhack-refresh-every=5", "--eval-ablate-every=3", f"--save-every={SAVE_EVERY}", f"--steps={STEPS}"),
    *("--intervention=route2", "--vhack-pairs-path=pairs.json", "--resume=auto"),
)
MOST_PER_RUN = 15  # then the run is left to finish, so that there is something to compare


def command(tag: str) -> list[str]:
    """What a queue manager would start again and again."""
    return ["train", "smoke", *OPTIONS, f"--out-tag=_{tag}"]


def start(tag: str, die_at: int | None) -> int:
    """Run in a fork; with `die_at` it kills itself at that one of its own writes. Returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        sink = os.open("campaign.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        done = die_while_writing(die_at)
        code = main(command(tag))
        Path("writes.txt").write_text(str(done()))
    finally:
        os._exit(code)


def die_while_writing(at: int | None) -> Callable[[], int]:
    """SIGKILL this process before its at-th fsync, rename, deletion or opening of a log.

    Returns what tells how many of these there were.
    """
    count = 0

    def mortal(function):
        def called(*arguments, **options):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return called

    os.fsync = mortal(os.fsync)
    os.replace = mortal(os.replace)
    os.rename = mortal(os.rename)
    Path.replace = mortal(Path.replace)
    Path.unlink = mortal(Path.unlink)
    os.open = mortal(os.open)  # which is how the logs are opened, and folders for their fsync
    return lambda: count


def steps_of(folder: Path) -> int:
    """Whole lines in steps.jsonl."""
    path = folder / "steps.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest(tag: str) -> Path | None:
    """The run folder that this tag last worked in."""
    return max(Path("out/runs").glob(f"*_{tag}*"), key=age, default=None)


def differences(one: Path, two: Path) -> list[str]:
    """Names of the files in which two runs differ, timings aside."""

    def lines(folder):
        rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        return [json.dumps({k: v for k, v in row.items() if k not in TIMINGS}) for row in rows]

    found = [] if lines(one) == lines(two) else ["steps.jsonl"]
    for name in ("rollouts.jsonl", "train.safetensors", "best.safetensors", "deploy.json"):
        if (one / name).read_bytes() != (two / name).read_bytes():
            found.append(name)
    a, b = (load_file(state_paths(folder)[0]) for folder in (one, two))
    if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
        found.append("state")
    summaries = [json.loads((f / "summary.json").read_text()) | {"seconds": 0} for f in (one, two)]
    return found + (["summary.json"] if summaries[0] != summaries[1] else [])


def wait(pid: int, seconds: float) -> int | None:
    """Exit status within this time, else None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    return None


class Campaign:
    """Counts of what happened."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.lost: list[int] = []
        self.differing: list[dict[str, object]] = []
        self.where: Counter[str] = Counter()

    def run(self, tag: str, reference: Path, seconds: float, writes: int, most: int) -> None:
        """One run, killed at most `most` times, to its end."""
        if self.rng.random() < 0.2:  # then the basis is extracted again, and that can be killed too
            shutil.rmtree("out/vhack", ignore_errors=True)
        killed = 0
        while True:
            by_timer = self.rng.random() < 0.5
            last = killed >= most
            pid = start(tag, None if by_timer or last else self.rng.randint(1, writes))
            status = wait(pid, 600 if last or not by_timer else self.rng.uniform(0, seconds))
            if status is None:
                os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                killed += 1
                self.note_kill(tag, "timer" if by_timer else "write")
            elif os.waitstatus_to_exitcode(status) == 0:
                break
            else:
                self.counts["failed"] += 1
                self.differing.append({"run": tag, "status": status})
                return
        self.counts["runs"] += 1
        folder = newest(tag)
        assert folder is not None
        made = json.loads((folder / "config.json").read_text())
        self.counts["resumes"] += len(made.get("resumed", []))
        wrong = differences(reference, folder)
        if wrong:
            self.counts["divergences"] += 1
            self.differing.append({"run": folder.name, "files": wrong})

    def note_kill(self, tag: str, how: str) -> None:
        """Where it struck, and how many steps the next attempt has to make again."""
        self.counts["kills"] += 1
        self.counts[f"kills_by_{how}"] += 1
        folder = newest(tag)
        saved = 0
        if folder is not None and state_paths(folder):
            saved = int(state_paths(folder)[0].stem.removeprefix("state_step"))
        made = 0 if folder is None else steps_of(folder)
        if made == STEPS:
            self.where["behind the last step"] += 1
        else:
            self.where["before the first save" if saved == 0 else "between saves"] += 1
        self.lost.append(max(0, made - saved))

    def report(self, wall_s: float) -> dict[str, object]:
        """The campaign in one object."""
        lost = Counter(self.lost)
        return {
            "kills": self.counts["kills"],
            "kills_by_timer": self.counts["kills_by_timer"],
            "kills_while_writing": self.counts["kills_by_write"],
            "where": dict(self.where),
            "runs": self.counts["runs"],
            "resumes": self.counts["resumes"],
            "failed": self.counts["failed"],
            "divergences": self.counts["divergences"],
            "differing": self.differing,
            "steps_lost": {str(k): lost[k] for k in sorted(lost)},
            "most_steps_lost": max(self.lost, default=0),
            "save_every": SAVE_EVERY,
            "steps": STEPS,
            "options": OPTIONS,
            "wall_s": round(wall_s),
            "git_commit": git_commit(),
            "machine": f"{os.cpu_count()} cores, {platform.system()}",
        }


def campaign(kills: int, minutes: float, seed: int, out: Path) -> int:
    """Kill until there were so many, or the time is up; write the report after every run."""
    torch.set_num_threads(1)
    out = out.resolve()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-campaign-") as work:
        os.chdir(work)
        shipped = json.loads(
            (Path(sys.modules["projected_grpo"].__path__[0]) / "data/pairs_core.json").read_text()
        )
        Path("pairs.json").write_text(json.dumps(shipped | {"name": "few", "pairs": shipped["pairs"][:5]}))
        for tag in ("warm", "reference"):  # the first one fills the caches
            started = time.monotonic()
            status = os.waitpid(start(tag, None), 0)[1]
            if status:
                print(Path("campaign.log").read_text()[-2000:], file=sys.stderr)
                return 1
            seconds = time.monotonic() - started
        reference = newest("reference")
        assert reference is not None
        writes = int(Path("writes.txt").read_text())
        found = Campaign(seed)
        while found.counts["kills"] < kills and time.monotonic() - begun < 60 * minutes:
            most = min(MOST_PER_RUN, kills - found.counts["kills"])
            found.run(
                f"run{found.counts['runs'] + found.counts['failed']:04d}", reference, seconds, writes, most
            )
            report = found.report(time.monotonic() - begun)
            write_json(out, report)
            print({k: report[k] for k in ("kills", "runs", "resumes", "divergences", "failed", "steps_lost")})
        os.chdir("/")
    return 1 if found.counts["divergences"] or found.counts["failed"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    sys.exit(campaign(asked.kills, asked.minutes, asked.seed, asked.out))
