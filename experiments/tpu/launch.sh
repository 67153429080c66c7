#!/usr/bin/env bash
source "$(dirname "$0")/common.sh"
source "$TPU/slice.sh"
USAGE="usage: bash experiments/tpu/launch.sh [--job FILE] [--dry-run] [--help]

Starts the training on every machine of the slice and returns; it goes on without this computer. Machines on which it
runs already are left alone. A run that is in the bucket is continued from its last checkpoint."
read_slice_options '' "$@"

on_workers all "$(where_set_up "start $(quoted "$BUCKET" "$MOUNT" "${TRAINING[@]}")")"
run "${SSH[@]}"
