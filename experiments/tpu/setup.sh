#!/usr/bin/env bash
source "$(dirname "$0")/common.sh"
source "$TPU/slice.sh"
USAGE="usage: bash experiments/tpu/setup.sh [--job FILE] [--keep-code] [--dry-run] [--help]

Sends the repository's tracked files, uncommitted changes included, to gs://BUCKET/code/NAME.tar.gz, and installs them
with what they need on every machine of the slice, where the bucket is mounted, too. --keep-code: installs what is in
the bucket, if something is, so that a job goes on with the code it began with; delete.sh ends a job."
read_slice_options --keep-code "$@"

state=$(training_state fresh) # not within the condition, which would take an error for "no"
if [[ $state == running ]]; then
  fail "the training of $NAME runs: its code cannot be replaced now; delete.sh stops it."
fi
stored=NOT_FOUND
[[ -z $ASKED ]] || stored=$(query NOT_FOUND gcloud storage objects describe "$CODE" --format='value(name)')
if [[ $stored == NOT_FOUND ]]; then
  archive=${TMPDIR:-/tmp}/$NAME.tar.gz
  archive_code "$archive"
  run gcloud storage cp "$archive" "$CODE"
fi
on_workers all "if [ -f $WORKER ]; then bash $WORKER stop; fi && gcloud storage cp $CODE code.tar.gz && \
rm -rf vlm_jax job/installed && mkdir vlm_jax && tar -xzf code.tar.gz -C vlm_jax && \
bash $WORKER install $(quoted "$BUCKET" "$MOUNT")"
run "${SSH[@]}"
