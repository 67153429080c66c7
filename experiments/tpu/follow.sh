#!/usr/bin/env bash
source "$(dirname "$0")/common.sh"
source "$TPU/slice.sh"
USAGE="usage: bash experiments/tpu/follow.sh [--job FILE] [--all] [--dry-run] [--help]

Shows what the training prints on the first machine, until it ends. --all: on every machine, lines with the machine's
name before them. Ctrl-C ends the showing, not the training."
read_slice_options --all "$@"

if [[ $ASKED ]]; then on_workers all "$(where_set_up "follow --names")"; else on_workers 0 "$(where_set_up follow)"; fi
run "${SSH[@]}"
