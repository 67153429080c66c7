#!/usr/bin/env bash
# What the scripts share: their options, the settings of a job, and how commands are run. Sourced, never run.
# shellcheck disable=SC2034  # what is set here is read by the scripts that source this
set -euo pipefail
shopt -s inherit_errexit

TPU=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$TPU/../.." && pwd)
WORKER=vlm_jax/experiments/tpu/worker.sh # on a machine of the TPU, from its home folder
POLL_SECONDS=${POLL_SECONDS:-30}
QUERY_ATTEMPTS=${QUERY_ATTEMPTS:-1}

exec 3>&1 # commands of a dry run are printed here, also from within $(...)
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

say() { echo "$(date +%H:%M:%S) $*"; }

fail() { # a mistake of the user
  echo "error: $*" >&2
  exit 2
}

# read_options OWN "$@": sets DRY_RUN, the settings of the job, SAME_JOB for a script called by this one, and ASKED
# where OWN, an option of one script alone, is among the arguments.
read_options() {
  local own=$1 job=$TPU/job.env
  shift
  DRY_RUN='' ASKED=''
  while (($#)); do
    case $1 in
    --help | -h)
      echo "$USAGE"
      exit 0
      ;;
    --dry-run) DRY_RUN=1 ;;
    --job)
      (($# > 1)) || fail "--job needs a file: a copy of experiments/tpu/job.env."
      job=$2
      shift
      ;;
    *)
      [[ -n $own && $1 == "$own" ]] ||
        fail "$1 is not an option of this script: choose --job FILE, --dry-run, ${own:+$own, }--help."
      ASKED=1
      ;;
    esac
    shift
  done
  SAME_JOB=(--job "$job" ${DRY_RUN:+--dry-run})
  read_settings "$job"
}

need_command() { # COMMAND HOW_TO_INSTALL_IT: a dry run only prints it
  [[ $DRY_RUN ]] || command -v "$1" >/dev/null || fail "$1 is not installed: $2."
}

read_settings() {
  PROJECT='' ZONE='' BUCKET='' NAME='' CONFIG='' ACCELERATOR_TYPE='' VERSION='' CAPACITY='' SERVICE_ACCOUNT='' MOUNT=''
  CLUSTER='' ARGUMENTS=()
  [[ -f $1 ]] || fail "--job $1 is not a file: copy experiments/tpu/job.env and fill in the copy."
  # Tried in a shell of its own: an error in it would end this one before it could say what to do.
  bash -eu "$1" >/dev/null || fail "--job $1 cannot be read: the error of bash is above; a value with spaces \
needs quotes, a list ( )."
  # shellcheck source=/dev/null
  source "$1"
  local setting word
  for setting in PROJECT ZONE BUCKET NAME CONFIG ACCELERATOR_TYPE VERSION CAPACITY MOUNT; do
    need "$setting" "$1"
  done
  [[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "NAME=$NAME in $1 names a TPU: at most 40 lower-case letters, digits and -, a letter first."
  [[ $BUCKET =~ ^[a-z0-9][a-z0-9._-]+$ ]] ||
    fail "BUCKET=$BUCKET in $1 must be the name of a bucket, without gs:// and folders."
  [[ $CAPACITY =~ ^(spot|on-demand|reserved)$ ]] || fail "CAPACITY=$CAPACITY in $1: choose spot, on-demand or reserved."
  [[ -f $ROOT/$CONFIG ]] || fail "CONFIG=$CONFIG in $1 is not a file in $ROOT."
  [[ $MOUNT == /* ]] || fail "MOUNT=$MOUNT in $1 must be the whole path of a folder: it starts with /."
  for word in "${ARGUMENTS[@]}"; do
    [[ ! $word =~ ^--[^=[:space:]]*[[:space:]] ]] ||
      fail "ARGUMENTS=$word in $1 is one word: write a list with an option and its value apart, (--mesh.fsdp 16)."
  done
  CODE=gs://$BUCKET/code/$NAME.tar.gz # what the machines run, as long as the job lasts
  WHERE=(--project="$PROJECT" --zone="$ZONE")
  # Left empty, ARGUMENTS= is a list of one empty word, and no option.
  TRAINING=(--config "$CONFIG" --workdir "$MOUNT/runs/$NAME" ${ARGUMENTS[*]:+"${ARGUMENTS[@]}"})
}

need() { # SETTING FILE
  [[ -n ${!1} ]] || fail "$1 is empty: set it in $2."
}

quoted() { # a command line that a shell reads as these words
  local word line=''
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@,%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line# }"
}

run() { # a command that changes something
  if [[ $DRY_RUN ]]; then quoted "$@" >&3; else "$@"; fi
}

# query ANSWER COMMAND...: what a command prints that only looks; NOT_FOUND where its object is not there. A dry run
# prints the command and goes on as if the answer were ANSWER. Every error is shown: it may be one that no retry mends.
query() {
  local answer=$1 attempt
  shift
  if [[ $DRY_RUN ]]; then
    quoted "$@" >&3
    echo "$answer"
    return
  fi
  for ((attempt = 1; ; attempt++)); do
    if answer=$("$@" 2>"$errors"); then
      echo "$answer"
      return
    elif grep -qE 'NOT_FOUND|not found: 404' "$errors"; then
      echo NOT_FOUND
      return
    fi
    cat "$errors" >&2
    ((attempt < QUERY_ATTEMPTS)) || return 1
    sleep "$POLL_SECONDS"
  done
}

# archive_code FILE: the repository's tracked files as they are, uncommitted changes included.
archive_code() {
  local new commit
  new=$(git -C "$ROOT" ls-files --others --exclude-standard)
  [[ -z $new ]] || echo "not sent, because git does not track them (git add): ${new//$'\n'/, }" >&2
  commit=$(git -C "$ROOT" -c user.name=tpu -c user.email=tpu@localhost stash create)
  run git -C "$ROOT" archive --format=tar.gz --output="$1" "${commit:-HEAD}"
}
