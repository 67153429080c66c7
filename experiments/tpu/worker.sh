#!/usr/bin/env bash
# What happens on a machine of the TPU; the other scripts call it. One training at a time, in a process group:
#   ~/job/installed  there once all it needs is; slice.sh looks for it
#   ~/job/lock       held as long as it runs
#   ~/job/group      the number of its process group
#   ~/job/exit_code  written when it ends; where it is missing, the machine went down with it
#   ~/job/ending     there once the TPU is to be deleted: nothing is started any more, until it is set up again
#   ~/job/log        what all its starts printed
set -euo pipefail

CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
JOB=$HOME/job
PYTHON=$HOME/venv/bin/python
REQUIREMENTS=(-r "$CODE/requirements.txt" "jax[tpu]") # the version of jax is that of requirements.txt
UV=0.13.9
STOP_SECONDS=${STOP_SECONDS:-120} # for the last checkpoint

install() { # BUCKET MOUNT
  mkdir -p "$JOB"
  rm -f "$JOB/installed" "$JOB/group" "$JOB/ending" # what ran before is of no interest to what comes
  # The system's Python is older than what we need, and its gcsfuse may be, too.
  curl -fLsS "https://astral.sh/uv/$UV/install.sh" | sh
  "$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 "$HOME/venv"
  "$HOME/.local/bin/uv" pip install --quiet --python "$PYTHON" "${REQUIREMENTS[@]}"
  local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  curl -fLsS "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update # a new machine updates itself meanwhile
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y gcsfuse
  mount_bucket "$@"
  touch "$JOB/installed"
  echo "$(hostname): set up"
}

mount_bucket() { # BUCKET MOUNT
  if mountpoint -q "$2"; then return; fi
  fusermount -uz "$2" 2>/dev/null || true # left by a gcsfuse that died
  sudo mkdir -p "$2"
  sudo chown "$(id -un)" "$2"
  # The machines write into one folder: nothing of it may be remembered, and what is synced must be in the bucket.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --enable-streaming-writes=false --rename-dir-limit=100000 "$1" "$2"
}

running() { ! flock -n "$JOB/lock" true; }

start() { # BUCKET MOUNT OPTIONS_OF_RUN_PY...
  if [[ -f $JOB/ending ]]; then
    echo "$(hostname): the TPU is being deleted; setup.sh makes it usable again" >&2
    return 1
  fi
  mount_bucket "$1" "$2"
  exec 9>>"$JOB/lock"
  if ! flock -n 9; then
    echo "$(hostname): the training is already running"
    return
  fi
  rm -f "$JOB/exit_code"
  # The lock is inherited, and so held until the last process of the training is gone.
  setsid bash "${BASH_SOURCE[0]}" train "${@:3}" </dev/null >>"$JOB/log" 2>&1 &
  echo $! >"$JOB/group"
  echo "$(hostname): launched"
}

train() { # OPTIONS_OF_RUN_PY...
  trap : TERM # the training is told, too: we stay to note how it ended
  local code=0
  cd "$CODE"
  # Left to itself, JAX computes on the CPU where the TPU fails.
  JAX_PLATFORMS=tpu,cpu "$PYTHON" run.py "$@" || code=$?
  echo "$code" >"$JOB/exit_code"
}

container() { # OPTIONS_OF_RUN_PY...: in a container, which has nothing but Python and the code
  cd "$CODE"
  python -m pip install --quiet --root-user-action ignore "${REQUIREMENTS[@]}"
  JAX_PLATFORMS=tpu,cpu exec python run.py "$@"
}

status() {
  if [[ -f $JOB/ending ]]; then
    echo "training: ending"
  elif [[ ! -f $JOB/group ]]; then
    echo "training: idle"
  elif running; then
    echo "training: running"
  else
    echo "training: $(cat "$JOB/exit_code" 2>/dev/null || echo lost)"
  fi
}

stop() {
  [[ -f $JOB/group ]] || return 0
  if running; then kill -TERM -- "-$(cat "$JOB/group")" || true; fi
  local waited
  for ((waited = 0; waited < STOP_SECONDS; waited++)); do
    if ! running; then return; fi
    sleep 1
  done
  kill -KILL -- "-$(cat "$JOB/group")"
}

end() { # whoever watches the job must not start it again while it is stopped for good
  touch "$JOB/ending"
  stop
}

follow() { # [--names]
  if [[ ! -f $JOB/group ]]; then
    echo "error: nothing was launched on $(hostname): run launch.sh first." >&2
    return 2
  fi
  local before=''
  [[ $# == 0 ]] || before="$(hostname): "
  tail -n 40 -F --pid="$(cat "$JOB/group")" "$JOB/log" | sed -u "s/^/$before/"
}

report() { # the last lines, where the training failed
  local code
  code=$(cat "$JOB/exit_code" 2>/dev/null || echo 0)
  if [[ $code != 0 ]]; then
    tail -n 30 "$JOB/log" | sed "s/^/$(hostname): /"
    echo "$(hostname): exit code $code"
  fi
}

"$@"
