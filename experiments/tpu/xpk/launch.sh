#!/usr/bin/env bash
source "$(dirname "$0")/../common.sh"
source "$(dirname "$0")/cluster.sh"
USAGE="usage: bash experiments/tpu/xpk/launch.sh [--job FILE] [--dry-run] [--help]

Starts the training on a cluster, with the repository's tracked files, uncommitted changes included. Kubernetes starts
it again where its machines were taken away or it says \"resume me\" (exit code 75); it goes on from its last
checkpoint. Where it runs or waits already, nothing happens."
read_cluster_options '' "$@"

for status in RUNNING QUEUED; do
  jobs=$(query '' xpk workload list --cluster="$CLUSTER" "${WHERE[@]}" --filter-by-status="$status" \
    --filter-by-job="^$NAME\$")
  if grep -q "^$NAME " <<<"$jobs"; then
    say "$NAME: ${status,,} already"
    exit
  fi
done
code=${TMPDIR:-/tmp}/$NAME.code
archive_code "$code.tar.gz"
run rm -rf "$code"
run mkdir "$code"
run tar -xzf "$code.tar.gz" -C "$code"
run xpk workload create --workload="$NAME" --cluster="$CLUSTER" "${WHERE[@]}" --tpu-type="$ACCELERATOR_TYPE" \
  --num-slices=1 --base-docker-image=python:3.12 --script-dir="$code" --max-restarts=1000 --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 --quiet \
  --command="exec bash experiments/tpu/worker.sh container $(quoted "${TRAINING[@]}")"
