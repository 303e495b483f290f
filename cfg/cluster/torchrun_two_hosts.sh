#!/bin/sh
# Train on two hosts with torchrun. FIRST is the first host's name or address, as both reach it:
#
#     sh torchrun_two_hosts.sh 0 FIRST data=/data/my.yaml out=/data/runs/both    # on the first host
#     sh torchrun_two_hosts.sh 1 FIRST data=/data/my.yaml out=/data/runs/both    # on the other
#
# PROCESSES: how many each host starts. auto, the default, is one for every GPU, or without GPUs
# one for every core. PORT has to be free and reachable on the first host; the processes choose
# more ports themselves, and nothing they send is encrypted: take a network that you trust.
# The data lies at the same path on both hosts; the first one alone writes `out`.
#
# torchrun ends with 1 where the run was saved after a signal (else 75): type the lines again.
set -eu
rank=$1 first=$2
shift 2
exec python -m torch.distributed.run \
  --nnodes=2 --node-rank="$rank" --nproc-per-node="${PROCESSES:-auto}" \
  --master-addr="$first" --master-port="${PORT:-29500}" \
  -m visiontrain train strategy=ddp resume=auto "$@"
