#!/usr/bin/env bash
# What the scripts for a GKE cluster share. Sourced, never run.

read_cluster_options() { # as read_options
  read_options "$@"
  need CLUSTER "${SAME_JOB[1]}"
  need_command xpk "pip install 'xpk>=1.16,<2'"
}
