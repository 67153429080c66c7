#!/usr/bin/env bash
source "$(dirname "$0")/common.sh"
source "$TPU/slice.sh"
USAGE="usage: bash experiments/tpu/create.sh [--job FILE] [--dry-run] [--help]

Asks for the TPU slice of a job and waits until it is there, which may take hours. Where it is there, nothing happens;
where it was taken away, it is asked for again. Ctrl-C ends the waiting and leaves the request in the queue."
read_slice_options '' "$@"

request() {
  local capacity=()
  case $CAPACITY in spot) capacity=(--spot) ;; reserved) capacity=(--reserved) ;; esac
  [[ -z $SERVICE_ACCOUNT ]] || capacity+=(--service-account="$SERVICE_ACCOUNT")
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${WHERE[@]}" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$VERSION" \
    --scopes=https://www.googleapis.com/auth/cloud-platform "${capacity[@]}"
}

delete_request() {
  run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

last='' asked='' may_ask=1 assumed=NOT_FOUND
while true; do
  state=$(slice_state "$assumed")
  [[ $state != READY ]] || break
  [[ $DRY_RUN || $state == "$last" ]] || say "$NAME: $state"
  last=$state
  case $state in
  NOT_FOUND)
    [[ $may_ask ]] || fail "$NAME was deleted while waiting for it."
    request
    asked=1 may_ask='' assumed=READY
    ;;
  FAILED)
    if [[ $asked ]]; then
      gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='yaml(state)' >&2
      echo "error: Google Cloud could not grant $NAME; its reason is above." >&2
      exit 1
    fi
    delete_request
    may_ask=1
    ;;
  SUSPENDED | PREEMPTED)
    delete_request
    asked='' may_ask=1
    ;;
  DELETING) sleep "$POLL_SECONDS" ;;
  *)
    may_ask=''
    sleep "$POLL_SECONDS"
    ;;
  esac
done
[[ $DRY_RUN ]] || say "$NAME: ready"
