# shellcheck shell=bash
# Shared by the commands of tpu/pod: errors, quoting, dry run, settings, and access to slices and workers.
# Must run in bash 3.2, the version that macOS ships.

fail() {  # MESSAGE: print one line and exit with status 1
  printf 'error: %s\n' "$1" >&2
  exit 1
}

usage_error() {  # MESSAGE: print one line and exit with status 2, for a mistake in the command line
  printf 'error: %s\n' "$1" >&2
  exit 2
}

note() { printf '%s tpu/pod: %s\n' "$(date +%H:%M:%S)" "$1" >&2; }

quoted() {  # WORD...: print the words quoted for a shell
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

run() {  # WORD...: run the command; with --dry-run, print it quoted instead
  if [ "$dry_run" = 1 ]; then printf '%s\n' "$(quoted "$@")"; else "$@"; fi
}

# --- settings: a flag, else its environment variable, else the default -----------------------------------------------

dry_run=0 yes=0
name=${POD_NAME-} project=${POD_PROJECT-} zone=${POD_ZONE-} accelerator=${POD_ACCELERATOR-} runtime=${POD_RUNTIME-}
slices=${POD_SLICES:-1} queued=${POD_QUEUED:-0} spot=${POD_SPOT:-0}
flex_start=${POD_FLEX_START-} reservation=${POD_RESERVATION-}
worker=0 grace=300 poll=60 retries=5

read_options() {  # OPTION...: set the settings, and rest to the number of words after --
  local option variable value
  while [ $# -gt 0 ]; do
    option=${1%%=*}
    variable=${option#--}
    variable=${variable//-/_}
    case $1 in
      --) shift; break ;;
      --dry-run) dry_run=1 ;;
      --yes) yes=1 ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --name | --project | --zone | --accelerator | --runtime | --slices | --flex-start | --reservation | --worker | \
        --grace | --poll | --retries)
        [ $# -gt 1 ] || usage_error "$option needs a value: $option VALUE"
        printf -v "$variable" %s "$2"
        shift ;;
      --name=* | --project=* | --zone=* | --accelerator=* | --runtime=* | --slices=* | --flex-start=* | \
        --reservation=* | --worker=* | --grace=* | --poll=* | --retries=*)
        value=${1#*=}
        printf -v "$variable" %s "$value" ;;
      --config* | --*.*) usage_error "$1 is an option of train.py: put it after --, as in: tpu/pod launch -- $1 ..." ;;
      *) usage_error "unknown option $1: tpu/pod help lists the options" ;;
    esac
    shift
  done
  rest=$#
}

whole_number() {  # OPTION VALUE LEAST
  case $2 in
    '' | *[!0-9]*) usage_error "$1 must be a whole number, got '$2'" ;;
  esac
  [ "$2" -ge "$3" ] || usage_error "$1 must be at least $3, got $2"
}

check_settings() {
  [ -n "$name" ] || usage_error "no name: set --name or POD_NAME, for example --name my-run"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,46}[a-z0-9])?$ ]] ||
    usage_error "--name must be lowercase letters, digits and dashes, and start with a letter, got '$name'"
  [ -n "$project" ] || usage_error "no project: set --project or POD_PROJECT to the ID of your Google Cloud project"
  [ -n "$zone" ] || usage_error "no zone: set --zone or POD_ZONE, for example --zone us-east5-b"
  whole_number --slices "$slices" 1
  whole_number --grace "$grace" 1
  whole_number --poll "$poll" 0
  whole_number --retries "$retries" 0
  whole_number --worker "$worker" 0
  local switch
  for switch in POD_QUEUED="$queued" POD_SPOT="$spot"; do
    case ${switch#*=} in 0 | 1) ;; *) usage_error "${switch%%=*} must be 0 or 1, got '${switch#*=}'" ;; esac
  done
  local kinds=0
  [ "$spot" = 0 ] || kinds=$((kinds + 1))
  [ -z "$flex_start" ] || kinds=$((kinds + 1))
  [ -z "$reservation" ] || kinds=$((kinds + 1))
  [ "$kinds" -le 1 ] || usage_error "use only one of --spot, --flex-start and --reservation"
  [ -z "$flex_start" ] || [[ $flex_start =~ ^([0-9]+[dhms])+$ ]] ||
    usage_error "--flex-start must be a time such as 24h, 90m or 7d, got '$flex_start'"
  [ -z "$flex_start$reservation" ] || queued=1  # gcloud takes these only for queued resources
  nodes=$name
  if [ "$slices" -gt 1 ]; then
    queued=1  # only a queued resource creates slices that know each other's addresses
    nodes=$(for ((i = 0; i < slices; i++)); do printf '%s ' "$name-$i"; done)
  fi
  where=("--project=$project" "--zone=$zone")
  [ "$dry_run" = 1 ] || command -v gcloud > /dev/null ||
    fail "gcloud is not on the PATH: install the Google Cloud CLI, or add --dry-run to print the commands"
}

check_accelerator() {  # also set the runtime version, if it is not given, and hosts to 1 or many
  [ -n "$accelerator" ] || usage_error "no accelerator type: set --accelerator or POD_ACCELERATOR, for example v6e-16"
  [[ $accelerator =~ ^[a-z]+[0-9][0-9a-z]*-[0-9]+$ ]] ||
    usage_error "--accelerator must look like v6e-16, v5p-128, v5litepod-16 or tpu7x-16, got '$accelerator'"
  if [ -z "$runtime" ]; then
    case $accelerator in
      tpu7x-*) runtime=v2-alpha-tpu7-ubuntu2404 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
      v7* | tpu7-*) usage_error "the accelerator type of Ironwood is tpu7x-N, got '$accelerator'" ;;
      *) usage_error "no runtime version is known for $accelerator: set --runtime (gcloud compute tpus tpu-vm versions list)" ;;
    esac
  fi
  # The number counts chips (v5litepod, v6e) or TensorCores, two per chip (v2, v3, v4, v5p, tpu7x). A host has at most
  # 8 chips of the first kind, and 4 of the second.
  hosts=1
  if [ "${accelerator##*-}" -gt 8 ] || [ "$slices" -gt 1 ]; then hosts=many; fi
}

# --- the slices and their workers ------------------------------------------------------------------------------------

on_worker() {  # NODE WORKER COMMAND: run the command in a shell on that worker; "all" runs it on all workers at once
  run gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" "--worker=$2" "--command=$3"
}

on_every_node() {  # ACTION ARGUMENT...: run ACTION NODE ARGUMENT... for all nodes; fail if one fails
  # In parallel: the processes of a run wait for each other when they start and when they save their last checkpoint.
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

column_of() { awk -F '\t' -v name="$1" '$1 == name { print $2 }'; }  # NAME: print the second column of its row

list_nodes() { run gcloud compute tpus tpu-vm list "${where[@]}" '--format=value(name.basename(),state)'; }

list_queued() {
  run gcloud compute tpus queued-resources list "${where[@]}" '--format=value(name.basename(),state.state)'
}

slice_state() {  # print READY, PREEMPTED, WAITING_FOR_RESOURCES ...; nothing if it does not exist; fail if unknown
  # Uses list, because describe fails the same way for a slice that does not exist and for a failed request.
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
      *) state=$one; break ;;  # a run needs all of its slices
    esac
  done
  [ "$queued" = 0 ] || state=${state:-LOST}  # the queued resource is ACTIVE, but a node is missing
  printf '%s' "$state"
}
