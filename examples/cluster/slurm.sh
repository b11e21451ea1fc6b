#!/usr/bin/env bash
# Run by an example's slurm.sbatch on the first node of its job: start SGLang servers on the last SERVER_NODES
# nodes, train on the others, and requeue the job when the run was interrupted (exit status 75).
#   SERVER_NODES=1 bash examples/cluster/slurm.sh CONFIG [section.key=value …]
# SERVER_NODES=0: one node, whose GPUs do both. SERVER_GPUS: GPUs per server (default 2). PYTHON, SGLANG_PYTHON:
# interpreters of the two environments, the same on all nodes. All nodes must see this folder, the model and
# logging.dir.
set -euo pipefail
config=$1
shift
python=${PYTHON:-python} sglang=${SGLANG_PYTHON:-.venv-sglang/bin/python}
gpus=${SLURM_GPUS_ON_NODE:-8} server_nodes=${SERVER_NODES:-0} server_gpus=${SERVER_GPUS:-2}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
training=$((${#nodes[@]} - server_nodes))
[ "$training" -ge 1 ] || { echo "slurm: SERVER_NODES=$server_nodes leaves no node of ${#nodes[@]} for training" >&2; exit 2; }
[ "$server_nodes" -gt 0 ] || [ "$training" -eq 1 ] || { echo "slurm: more than one training node needs SERVER_NODES" >&2; exit 2; }
model=$("$python" -c 'import sys; from megatron_srpo.config.load import load_config
from pathlib import Path
print(load_config(Path(sys.argv[1]), sys.argv[2:]).model.hf_path)' "$config" "$@")

[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # from Slurm 22.05 on, srun does not inherit it
overrides=()
if [ "$server_nodes" -gt 0 ]; then
    SGLANG_API_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # for this job; --export=ALL passes it to all steps
    export SGLANG_API_KEY
    urls=()
    for node in "${nodes[@]:training}"; do
        for ((first = 0; first + server_gpus <= gpus; first += server_gpus)); do
            port=$((30000 + first))
            urls+=("http://$node:$port")
            # The key is read inside the step, so it is not in the command line of srun. --signal's USR1 reaches all
            # steps but is meant for the run, whose last step still samples.
            srun --overlap --nodes 1 --ntasks 1 --nodelist "$node" --export=ALL --kill-on-bad-exit=0 bash -c \
                "trap '' USR1; exec $(printf %q "$sglang") -m sglang.launch_server --model-path $(printf %q "$model") --dtype bfloat16 \
                --host 0.0.0.0 --port $port --tp-size $server_gpus --base-gpu-id $first --api-key \"\$SGLANG_API_KEY\"" &
        done
    done
    overrides+=("rollout.urls=[$(IFS=,; echo "${urls[*]}")]" rollout.servers=0 rollout.colocated=false
        rollout.sglang.update=distributed rollout.sglang.api_key_env=SGLANG_API_KEY "rollout.sglang.tensor_parallel_size=$server_gpus")
fi

status=0
# When a host is lost, the ranks of the others end after parallel.distributed_timeout_minutes; --wait ends a
# torchrun that lingers.
srun --wait=120 --kill-on-bad-exit=0 --nodes "$training" --ntasks "$training" --ntasks-per-node 1 --nodelist "$(IFS=,; echo "${nodes[*]:0:training}")" --export=ALL \
    "$python" tools/torchrun.py --nnodes "$training" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "${nodes[0]}:29500" -m megatron_srpo train "$config" "${overrides[@]}" "$@" || status=$?
jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true # the steps of the servers
if [ "$status" -eq 75 ]; then
    echo "slurm: the run has saved a checkpoint; the job is requeued"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends this script
fi
exit "$status"
