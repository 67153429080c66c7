#!/usr/bin/env bash
source "$(dirname "$0")/../common.sh"
source "$(dirname "$0")/cluster.sh"
USAGE="usage: bash experiments/tpu/xpk/follow.sh [--job FILE] [--all] [--dry-run] [--help]

Shows the state of the job, and what its first machine prints, until it ends. --all: what every machine prints."
read_cluster_options --all "$@"

# xpk also tells kubectl which cluster is meant.
run xpk workload list --cluster="$CLUSTER" "${WHERE[@]}" --filter-by-job="^$NAME\$"
pods=xpk.google.com/workload=$NAME
[[ $ASKED ]] || pods+=,batch.kubernetes.io/job-completion-index=0
run kubectl logs --follow --prefix --tail=40 --max-log-requests=1024 --selector="$pods"
