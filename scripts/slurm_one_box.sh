#!/usr/bin/env bash
# A real Slurm on this machine alone, and a sweep of four tiny runs through it: one run is preempted on the way (it
# has to queue itself again), the process of another is killed (the same command has to pick it up).
# Needs slurm-wlm and munge (Debian: apt-get install slurm-wlm), root, and the extra `slurm`.
# Usage: scripts/slurm_one_box.sh [PYTHON]     All it writes is in a temporary folder; its daemons end with it.
set -euo pipefail
python=$(command -v "${1:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") # a link of a venv must stay one
folder=$(mktemp -d)
host=$(hostname -s)
daemons=()
cleanup() { # the jobs too: they would outlive the daemons
    squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel 2>/dev/null || true
    for _ in $(seq 30); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 1; done
    kill "${daemons[@]}" 2>/dev/null || true
}
trap cleanup EXIT
cd "$folder"
mkdir state spool
head -c 1024 /dev/urandom >munge.key && chmod 600 munge.key
munged --foreground --force --key-file="$PWD/munge.key" --socket="$PWD/munge.sock" --pid-file="$PWD/munge.pid" \
    --log-file="$PWD/munge.log" --seed-file="$PWD/munge.seed" 2>/dev/null &
daemons+=($!)
cat >slurm.conf <<EOF
ClusterName=onebox
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthInfo=socket=$folder/munge.sock
CredType=cred/munge
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=one Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
export SLURM_CONF="$folder/slurm.conf"
sleep 1
slurmctld -D -f "$SLURM_CONF" 2>/dev/null &
daemons+=($!)
slurmd -D -f "$SLURM_CONF" -N "$host" 2>/dev/null &
daemons+=($!)
for _ in $(seq 30); do sinfo -h -o %T 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo

cat >four.toml <<'EOF'
name = "four"
preset = "nano"
engine = "slurm"
[options]
steps = 24
final-n-prompts = 8
workers = 1
save-every = 1
[[arms]]
name = "none"
options = { intervention = "none" }
[[arms]]
name = "erase"
options = { intervention = "erase" }
[grid]
seed = "1-2"
[limits]
jobs = 2
cores = 1
[slurm]
timeout_min = 30
EOF
verb=("$python" -m projected_grpo.cli)
jobs=out/sweeps/four/jobs
wait_for() { # until the command holds, for ten minutes
    for _ in $(seq 600); do "$@" && return; sleep 1; done
    echo "waited in vain for: $*" >&2
    exit 1
}
pid_of() { sed -n 's/.*"pid": \([0-9]*\).*/\1/p' "$jobs/$1.jsonl" | tail -1; } # of its newest attempt
requeued() { grep -qsh Requeued out/sweeps/four/slurm/*.out; }
saved() { compgen -G "out/sweeps/four/runs/*_$1/state/*.safetensors" >/dev/null; }
drained() { [ -z "$(squeue -h -o %i)" ]; }

"${verb[@]}" sweep four.toml --dry-run | tee plan.txt
mapfile -t ids < <(sed -n 's/.*--out-tag=_//p' plan.txt) # in the order of the array's elements
preempted=${ids[0]} killed=${ids[1]}
"${verb[@]}" sweep four.toml
squeue
array=$(squeue -h -o %F | head -1)
wait_for saved "$preempted"
wait_for saved "$killed" # both run before either is stopped
victim=$(pid_of "$killed")
echo "preempting $preempted"
# What Slurm sends before it takes a job's node away. Once: scancel itself tries again five seconds later, and for
# a minute and a half, where it finds that the job has queued itself again; by then the other runs have ended.
timeout 4 scancel --signal=USR2 "${array}_0" || true
echo "killing the process of $killed"
kill -KILL "$victim" || { echo "the run to be killed had ended" >&2; exit 1; }
wait_for requeued
wait_for drained
"${verb[@]}" sweep status four.toml
"${verb[@]}" sweep four.toml # goes on with the killed run alone
wait_for drained
"${verb[@]}" sweep status four.toml | tee status.txt
head -1 status.txt | grep -qx "4 runs: 4 finished"
for id in "$preempted" "$killed"; do
    echo "attempts at $id:" && sed -n 's/.*"command": "\([^"]*\)".*/  train \1/p' "$jobs/$id.jsonl"
    grep -q -- --resume "$jobs/$id.jsonl"
done
grep -h "Requeued" out/sweeps/four/slurm/*.out
echo "PASS: four runs finished through Slurm $(sinfo --version); $folder has the logs"
