# `just` alone lists the recipes. The set-up line is in README.md.

python := if path_exists(".venv/bin/python") == "true" { ".venv/bin/python" } else { "python3" }
train := python + " -m projected_grpo.train"
verb := python + " -m projected_grpo.cli"
checked := "PROJECTED_GRPO_CHECK_SHAPES=1"
model := "Qwen/Qwen3-4B"

_default:
    @just --list

# The whole pipeline on a tiny random model, erase arm, shapes checked: any CPU, under a minute.
smoke *options:
    {{checked}} {{train}} smoke --intervention=erase {{options}}

# smoke without an intervention.
smoke-none *options:
    {{checked}} {{train}} smoke --intervention=none {{options}}

# smoke with the hack-ward component routed into the quarantine.
smoke-route *options:
    {{checked}} {{train}} smoke --intervention=route {{options}}

# smoke with hack-ward rollouts routed into the quarantine.
smoke-route2 *options:
    {{checked}} {{train}} smoke --intervention=route2 {{options}}

# All four arms of smoke.
smoke-all: smoke-none smoke smoke-route smoke-route2

# Lint, types, and the grader's hack x mode matrix.
check:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} -m mypy
    {{checked}} {{python}} -m pytest tests/test_rewards.py -k matrix

# Lint, types and every test.
test *options:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} -m mypy
    {{python}} -m pytest -n auto --dist loadfile {{options}}

# Put a model into the local cache (needs network).
download-model name=model:
    {{python}} -c "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1]))" {{name}}

# The packaged small model learns to hack: CPU, minutes.
nano *options:
    {{train}} nano --intervention=none {{options}}

# Every arm and control of the nano study that is not there yet, then its tables and pictures. Hours; resumable.
study-nano *options:
    {{verb}} study nano {{options}}

# The tables and pictures again, from the records in docs/results/nano, and those of docs/results.md.
study-nano-report:
    {{verb}} study nano --report-only --page docs/results.md

# 60 steps of Qwen3-4B: one 48-96 GB GPU.
fast *options:
    {{train}} fast {{options}}

# 200 steps of Qwen3-4B: one 96 GB GPU.
full *options:
    {{train}} full {{options}}

# One seed, gated: extract, verify, none, the arm; stops with its reason at the first gate that fails.
probe-full-seed seed="41" *options:
    {{verb}} probe --preset full --model {{model}} --seed {{if seed =~ '^-' { '41 ' + seed } else { seed } }} {{options}}

# Queue the full sweep with pueue: three arms for each seed, with the probe's gates between them.
queue-full seeds="41 42 43" *options:
    {{verb}} sweep docs/sweeps/full.toml --engine pueue --gates {{if seeds =~ '^-' { seeds } else { '--seeds "' + seeds + '"' } }} {{options}}

# Every run of a sweep that is not finished; docs/sweeps.md has the file and the engines.
sweep spec *options:
    {{verb}} sweep {{spec}} {{options}}

# A real Slurm on this machine alone, and a sweep of four tiny runs through it. Root, slurm-wlm and munge.
slurm-one-box:
    scripts/slurm_one_box.sh {{python}}

# Is this machine ready for a preset? A line per need, with its fix.
doctor *options:
    {{verb}} doctor {{options}}

# Measure this package on a CUDA GPU beside what was predicted: half an hour in calls of under 9 minutes, resumable.
gpu-check *options:
    {{python}} scripts/gpu_check.py {{options}}

# Kill small runs 200 times, go on with each, compare it with one that was not killed. About half an hour.
kill-campaign kills="200":
    {{python}} scripts/kill_campaign.py --kills {{kills}} --out docs/results/kill_campaign.json

# Damage every format of file that is read, this often each: it is read, or refused in one line. Minutes.
fuzz examples="1000":
    PROJECTED_GRPO_FUZZ={{examples}} {{python}} -m pytest -n auto tests/test_fuzz.py tests/test_fuzz_runs.py

# Tables over the seeds of every finished setting.
results *runs:
    {{verb}} results {{runs}}

# Pictures of finished runs, into out/pictures.
plot *runs:
    {{verb}} plot --out out/pictures {{runs}}

# The site of these pages, into out/site; a broken link fails.
docs:
    {{python}} -m sphinx -W --keep-going -q -b html -d out/site.doctrees docs out/site
