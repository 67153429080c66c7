#!/usr/bin/env bash
source "$(dirname "$0")/common.sh"
source "$TPU/slice.sh"
USAGE="usage: bash experiments/tpu/resume.sh [--job FILE] [--then-delete] [--dry-run] [--help]

Brings a job to its end: creates the TPU, sets it up, launches, and watches. Where the TPU is taken away, all this is
done again, and the run goes on from its last checkpoint, with the code it began with. Ends with 0 when the training is
done, and with 1 when it failed, its last lines shown. --then-delete: deletes the TPU at the end, whichever it is."
read_slice_options --then-delete "$@"
export QUERY_ATTEMPTS=5 # a connection may break in hours of watching

end() { # CODE
  local code=$1 deleted=''
  if [[ $ASKED ]]; then
    if bash "$TPU/delete.sh" "${SAME_JOB[@]}"; then deleted=1; else code=1; fi
  fi
  if [[ $DRY_RUN ]]; then exit; fi
  [[ $deleted ]] || say "the TPU still exists and costs money: bash experiments/tpu/delete.sh ${SAME_JOB[*]}"
  exit "$code"
}

failures=0 # since the training last ran
count_failure() { # WHAT: it may have failed because the TPU is taken away, so what is there now is looked at again
  failures=$((failures + 1))
  say "$1 failed, time $failures of 3"
  if ((failures == 3)); then
    say "resume.sh exits: start it again to continue the job"
    end 1
  fi
}

step() { # SCRIPT OPTIONS...
  bash "$TPU/$1" "${SAME_JOB[@]}" "${@:2}" || count_failure "$1"
}

relaunch() { # one machine that still computes would wait for the others for ever
  on_workers all "bash $WORKER stop"
  run "${SSH[@]}" || true
  step launch.sh
}

watch() { # what the training does, and what follows from it
  local training
  training=$(training_state "$1") || training=unknown
  if [[ $DRY_RUN ]]; then
    echo "# the training is $training:"
  elif [[ $training != "$last" ]]; then
    say "$NAME: training $training"
  fi
  last=$training
  case $training in
  fresh) step setup.sh --keep-code ;;
  idle) step launch.sh ;;
  resume) relaunch ;;
  running) failures=0 ;;
  ending) ;; # by the user: the TPU is about to go
  unknown) count_failure "asking the machines" ;;
  failed)
    on_workers all "bash $WORKER report"
    run "${SSH[@]}" || true
    end 1
    ;;
  'done') end 0 ;;
  esac
}

last=''
if [[ $DRY_RUN ]]; then # one round of each kind
  step create.sh
  for training in fresh idle resume failed; do watch "$training"; done
fi
step create.sh
while true; do
  state=$(slice_state READY) || state=unknown
  case $state in
  READY) watch running ;;
  unknown) count_failure "asking Google Cloud" ;;
  NOT_FOUND)
    echo "error: the TPU $NAME was deleted; its run is in gs://$BUCKET/runs/$NAME." >&2
    exit 1
    ;;
  DELETING) ;; # by the user: it is not asked for again
  *)
    say "$NAME: $state"
    step create.sh
    ;;
  esac
  sleep "$POLL_SECONDS"
done
