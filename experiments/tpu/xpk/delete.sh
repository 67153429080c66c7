#!/usr/bin/env bash
source "$(dirname "$0")/../common.sh"
source "$(dirname "$0")/cluster.sh"
USAGE="usage: bash experiments/tpu/xpk/delete.sh [--job FILE] [--cluster] [--dry-run] [--help]

Stops the job of that name and deletes it. The cluster and its TPU stay, and cost money, unless --cluster deletes them,
too, with whatever else runs there. What is in the bucket stays."
read_cluster_options --cluster "$@"

jobs=$(query "$NAME " xpk workload list --cluster="$CLUSTER" "${WHERE[@]}" --filter-by-job="^$NAME\$")
if grep -q "^$NAME " <<<"$jobs"; then
  run xpk workload delete --workload="$NAME" --cluster="$CLUSTER" "${WHERE[@]}" --quiet
else
  say "job $NAME does not exist"
fi
[[ -z $ASKED ]] || run xpk cluster delete --cluster="$CLUSTER" "${WHERE[@]}" --quiet --force
