#!/usr/bin/env bash
# One TPU slice, asked for through a queued resource of the same name: its state, its machines. Sourced, never run.

read_slice_options() { # as read_options
  read_options "$@"
  need_command gcloud "see cloud.google.com/sdk/docs/install"
}

# on_workers ALL_OR_NUMBER COMMAND: the words of a command that runs COMMAND, a shell line, on machines of the slice.
on_workers() {
  SSH=(gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$1" --quiet --command="$2")
}

# where_set_up WORDS [ELSE]: the shell line that runs worker.sh with WORDS on a machine, and ELSE on one not set up.
where_set_up() {
  local refuse="echo \"error: \$(hostname) is not set up: run setup.sh first.\" >&2; exit 2"
  echo "if [ -f job/installed ]; then bash $WORKER $1; else ${2:-$refuse}; fi"
}

# request_state ASSUMED: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, ... or NOT_FOUND.
request_state() {
  query "$1" gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)'
}

# slice_state ASSUMED: READY; PREEMPTED, where the machines of a granted request are gone; else the state of the request
# or, where that is granted, of its machines.
# Here and below, `|| return` is for callers that survive an error: set -e is off in what they call.
slice_state() {
  local state
  state=$(request_state "${1/READY/ACTIVE}") || return
  if [[ $state == ACTIVE ]]; then
    # A request stays ACTIVE for a while after its machines were taken away.
    state=$(query "$1" gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" --format='value(state)') || return
    case $state in NOT_FOUND | TERMINATED | STOPPED | STOPPING) state=PREEMPTED ;; esac
  fi
  echo "$state"
}

# training_state ASSUMED: what its machines say of the training, in one word: fresh (to be set up), idle (to be
# launched), running, resume (stopped by SIGTERM on some machine, or gone with a restart of it), ending (delete.sh stops
# it), failed, or done.
training_state() {
  local said
  on_workers all "$(where_set_up status 'echo training: fresh')"
  said=$(query '' "${SSH[@]}") || return
  if [[ $DRY_RUN ]]; then
    echo "$1"
    return
  fi
  said=$(sed -n 's/^training: //p' <<<"$said" | sort -u | tr '\n' ' ')
  case " $said" in
  *" ending "*) echo ending ;;
  *" fresh "*) echo fresh ;;
  # Where one machine is taken away, the others fail for want of it: this comes before failed.
  *" 75 "* | *" lost "*) echo resume ;;
  *[1-9]*) echo failed ;;
  " idle ") echo idle ;;
  *" idle "*) echo resume ;; # a launch did not reach every machine
  *" running "*) echo running ;;
  " 0 ") echo 'done' ;;
  *)
    echo "no machine of $NAME reports its state" >&2
    return 1
    ;;
  esac
}
