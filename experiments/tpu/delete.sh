#!/usr/bin/env bash
source "$(dirname "$0")/common.sh"
source "$TPU/slice.sh"
USAGE="usage: bash experiments/tpu/delete.sh [--job FILE] [--dry-run] [--help]

Stops the training, which saves, and deletes the TPU and its request: from then on it costs nothing. The run stays in
the bucket; the job's code is removed there, so that the next job sends what is here then. Where nothing is, nothing
happens."
read_slice_options '' "$@"

state=$(slice_state READY)
if [[ $state == READY ]]; then
  on_workers all "if [ -f $WORKER ]; then bash $WORKER end; fi"
  run "${SSH[@]}" || echo "the training could not be stopped first: it will continue from its last checkpoint" >&2
fi
while [[ $state == SUSPENDING || $state == DELETING ]]; do
  sleep "$POLL_SECONDS"
  state=$(slice_state READY)
done
if [[ $state == NOT_FOUND ]]; then
  say "TPU $NAME does not exist"
else
  run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
  [[ $DRY_RUN ]] || say "$NAME: deleted"
fi
if [[ $(query "$CODE" gcloud storage objects describe "$CODE" --format='value(name)') != NOT_FOUND ]]; then
  run gcloud storage rm "$CODE"
fi
