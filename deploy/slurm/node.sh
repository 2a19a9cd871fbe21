#!/bin/bash
# The node of this host, by its place in the job: prefill engines' hosts first, then those of decode
# engines, then readers. Called by cluster.sbatch, which says how many. It is called as its host is,
# so that the next job's node finds the blocks of this one's; an engine as the first of its hosts.
place=$SLURM_NODEID
read -ra at <<<"$ADDRESSES" # each host of the job
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((place < PREFILL * PREFILL_HOSTS)); then
    role=prefill first=0 nnodes=$PREFILL_HOSTS
elif ((place < PREFILL * PREFILL_HOSTS + DECODE * DECODE_HOSTS)); then
    role=decode first=$((PREFILL * PREFILL_HOSTS)) nnodes=$DECODE_HOSTS
else
    role=reader first=0 nnodes=1
fi
rank=$(((place - first) % nnodes))
leader=$((place - rank))
name=${hosts[leader]//[^[:alnum:]-]/_}
exec "$PYTHON" -m launch.node --join "$JOIN" --cluster-secret-file "$SECRET" --role "$role" \
    --name "$name" --host "${at[place]}" --drain-timeout-s "$DRAIN_TIMEOUT_S" \
    --nnodes "$nnodes" --node-rank "$rank" --dist-init-addr "${at[leader]}:29400" "$@"
