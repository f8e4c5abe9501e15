# shellcheck shell=bash
# What every command of tpu/pod needs: errors, quoting, dry run, settings, and one way to each slice and worker.
# Bash 3.2, which macOS has, must understand all of it.

fail() {  # MESSAGE: one line, status 1
  printf 'error: %s\n' "$1" >&2
  exit 1
}

misused() {  # MESSAGE: one line, status 2: the command itself is wrong
  printf 'error: %s\n' "$1" >&2
  exit 2
}

note() { printf '%s tpu/pod: %s\n' "$(date +%H:%M:%S)" "$1" >&2; }

quoted() {  # WORD...: the words so that a shell reads them back as they are
  local word line=""
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=,@%+-]*)
        case $word in *\'*) printf -v word %q "$word" ;; *) word="'$word'" ;; esac ;;
      '') word="''" ;;
    esac
    line="$line $word"
  done
  printf '%s' "${line# }"
}

run() {  # WORD...: runs the command; with --dry-run prints it, ready to be pasted
  if [ "$dry_run" = 1 ]; then printf '%s\n' "$(quoted "$@")"; else "$@"; fi
}

# --- settings: a flag, or else its environment variable, or else the default -----------------------------------------

dry_run=0 yes=0
name=${POD_NAME-} project=${POD_PROJECT-} zone=${POD_ZONE-} accelerator=${POD_ACCELERATOR-} runtime=${POD_RUNTIME-}
slices=${POD_SLICES:-1} queued=${POD_QUEUED:-0} spot=${POD_SPOT:-0}
worker=0 grace=300 poll=60 retries=5

read_options() {  # OPTION...: sets the settings, and rest=N, the number of words after --
  local option value
  while [ $# -gt 0 ]; do
    option=${1%%=*}
    case $1 in
      --) shift; break ;;
      --dry-run) dry_run=1 ;;
      --yes) yes=1 ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --name | --project | --zone | --accelerator | --runtime | --slices | --worker | --grace | --poll | --retries)
        [ $# -gt 1 ] || misused "$option needs a value, as in: $option VALUE"
        printf -v "${option#--}" %s "$2"
        shift ;;
      --name=* | --project=* | --zone=* | --accelerator=* | --runtime=* | --slices=* | --worker=* | --grace=* | \
        --poll=* | --retries=*)
        value=${1#*=}
        printf -v "${option#--}" %s "$value" ;;
      --config* | --*.*) misused "$1 is an option of train.py: those come after --, as in: tpu/pod launch -- $1 ..." ;;
      *) misused "unknown option $1: tpu/pod help lists them" ;;
    esac
    shift
  done
  rest=$#
}

whole_number() {  # OPTION VALUE LEAST
  case $2 in
    '' | *[!0-9]*) misused "$1 must be a whole number, and is '$2'" ;;
  esac
  [ "$2" -ge "$3" ] || misused "$1 must be $3 or more, and is $2"
}

check_settings() {
  [ -n "$name" ] || misused "no name: give --name or set POD_NAME, as in: --name my-run"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,46}[a-z0-9])?$ ]] ||
    misused "--name must be small letters, digits and dashes, starting with a letter, and is '$name'"
  [ -n "$project" ] || misused "no project: give --project or set POD_PROJECT to your Google Cloud project's id"
  [ -n "$zone" ] || misused "no zone: give --zone or set POD_ZONE, as in: --zone us-east5-b"
  whole_number --slices "$slices" 1
  whole_number --grace "$grace" 1
  whole_number --poll "$poll" 0
  whole_number --retries "$retries" 0
  whole_number --worker "$worker" 0
  local switch
  for switch in POD_QUEUED="$queued" POD_SPOT="$spot"; do
    case ${switch#*=} in 0 | 1) ;; *) misused "${switch%%=*} must be 0 or 1, and is '${switch#*=}'" ;; esac
  done
  nodes=$name
  if [ "$slices" -gt 1 ]; then
    queued=1  # only a queued resource makes slices that know of each other
    nodes=$(for ((i = 0; i < slices; i++)); do printf '%s ' "$name-$i"; done)
  fi
  where=("--project=$project" "--zone=$zone")
  [ "$dry_run" = 1 ] || command -v gcloud > /dev/null ||
    fail "gcloud is not on the PATH: install the Google Cloud CLI, or add --dry-run to see the commands"
}

check_accelerator() {  # also sets the runtime version that fits, and hosts: 1, or many
  [ -n "$accelerator" ] || misused "no accelerator type: give --accelerator or set POD_ACCELERATOR, as in: v6e-16"
  [[ $accelerator =~ ^v[0-9a-z]+-[0-9]+$ ]] ||
    misused "--accelerator must look like v6e-16, v5p-128 or v5litepod-16, and is '$accelerator'"
  if [ -z "$runtime" ]; then
    case $accelerator in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
      *) misused "no runtime version is known for $accelerator: give --runtime (gcloud compute tpus tpu-vm versions list)" ;;
    esac
  fi
  # The number counts chips (v5litepod, v6e: up to 8 on a host) or their cores, two a chip (v2 to v4, v5p: 4 chips).
  hosts=1
  if [ "${accelerator##*-}" -gt 8 ] || [ "$slices" -gt 1 ]; then hosts=many; fi
}

# --- the slices and their workers ------------------------------------------------------------------------------------

on_worker() {  # NODE WORKER COMMAND: the command in a shell on that worker ("all": on all of them at once)
  run gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" "--worker=$2" "--command=$3"
}

on_every_node() {  # ACTION ARGUMENT...: ACTION NODE ARGUMENT... for all nodes; fails if one fails
  # At the same time, not one after the other: processes of a run wait for each other, when they start and when they
  # save their last checkpoint.
  local action=$1 node pid pids="" failed=0
  shift
  for node in $nodes; do
    if [ "$dry_run" = 1 ] || [ "$slices" = 1 ]; then
      "$action" "$node" "$@" || failed=1
    else
      ("$action" "$node" "$@" || { note "$node: failed"; exit 1; }) &
      pids="$pids $!"
    fi
  done
  for pid in $pids; do wait "$pid" || failed=1; done
  return $failed
}

on_all() { on_every_node on_worker all "$1"; }  # COMMAND

column_of() { awk -F '\t' -v name="$1" '$1 == name { print $2 }'; }  # NAME: its second column

list_nodes() { run gcloud compute tpus tpu-vm list "${where[@]}" '--format=value(name.basename(),state)'; }

list_queued() {
  run gcloud compute tpus queued-resources list "${where[@]}" '--format=value(name.basename(),state.state)'
}

slice_state() {  # prints READY, PREEMPTED, WAITING_FOR_RESOURCES ...; nothing if there is none; fails if unknown
  # A list rather than a describe: there, "does not exist" and "cannot be asked" are the same failure.
  local listed state node one
  if [ "$queued" = 1 ]; then
    listed=$(list_queued) || return 1
    state=$(column_of "$name" <<< "$listed")
    [ "$state" = ACTIVE ] || { printf '%s' "$state"; return; }
  fi
  listed=$(list_nodes) || return 1
  for node in $nodes; do
    one=$(column_of "$node" <<< "$listed")
    case $one in
      READY) state=READY ;;
      *) state=$one; break ;;  # one slice that is lost is the whole run lost
    esac
  done
  [ "$queued" = 0 ] || state=${state:-LOST}  # promised, and not there
  printf '%s' "$state"
}
