#!/usr/bin/env bash
source "$(dirname "$0")/../common.sh"
source "$(dirname "$0")/cluster.sh"
USAGE="usage: bash experiments/tpu/xpk/create.sh [--job FILE] [--dry-run] [--help]

Makes a GKE cluster with one TPU slice, whose jobs see the bucket in the folder MOUNT. Where the cluster is there, xpk
brings in line what differs."
read_cluster_options '' "$@"
[[ $CAPACITY != reserved ]] || fail "CAPACITY=reserved is not supported on GKE: choose spot or on-demand."

run xpk cluster create --cluster="$CLUSTER" "${WHERE[@]}" --tpu-type="$ACCELERATOR_TYPE" --num-slices=1 "--$CAPACITY" \
  --enable-gcsfuse-csi-driver --quiet
storages=$(query '' xpk storage list --cluster="$CLUSTER" "${WHERE[@]}")
if ! grep -qw "$BUCKET" <<<"$storages"; then
  # As worker.sh mounts it; xpk wants a size, which means nothing for a bucket.
  options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
  options+=,write:enable-streaming-writes:false,file-system:rename-dir-limit:100000
  run xpk storage attach "$BUCKET" --cluster="$CLUSTER" "${WHERE[@]}" --type=gcsfuse --mount-point="$MOUNT" \
    --readonly=false --auto-mount=true --size=1 --no-prefetch-metadata --mount-options="$options"
fi
