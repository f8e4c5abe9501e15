#!/usr/bin/env bash
# What happens on each worker: tpu/pod copies this file to the home folder of all of them and calls it there.
# bash worker.sh install | idle | launch TRAIN-OPTION... | state | logs | stop SECONDS [by-hand]
set -euo pipefail
code=$HOME/layerskip_jax         # the repository, as it was when it was installed
venv=$HOME/layerskip_jax_venv
run=$HOME/layerskip_jax_run      # pid: of train.py while it runs; exit: its status; stopped: by tpu/pod stop; log

fail() {
  printf 'error: %s: %s\n' "$(hostname)" "$1" >&2
  exit 1
}

running() {  # the file alone does not say so: a worker may have been restarted, and the number given to another program
  [ -s "$run/pid" ] && ps -p "$(cat "$run/pid")" -o args= 2> /dev/null | grep -q 'train\.py'
}

idle() {
  if running; then fail "a run is going on here (process $(cat "$run/pid")): end it with tpu/pod stop"; fi
}

install() {
  idle
  mkdir -p "$code" "$run"
  tar -xzf layerskip_jax.tar.gz -C "$code"
  # Python 3.11 or newer is needed, and the TPU images of Ubuntu 22.04 come with 3.10: uv brings its own.
  python3 -m pip install --quiet --user uv || fail "pip could not install uv: its message is above"
  [ -x "$venv/bin/python" ] || python3 -m uv venv --quiet --python 3.12 "$venv" || fail "no Python 3.12 from uv"
  python3 -m uv pip install --quiet --python "$venv/bin/python" --editable "${code}[tpu]" ||
    fail "the package could not be installed"
  echo "$(hostname): installed"
}

launch() {
  idle
  [ -x "$venv/bin/python" ] || fail "nothing is installed here: tpu/pod install first"
  rm -f "$run/pid" "$run/exit" "$run/stopped"
  nohup bash "$0" train "$@" >> "$run/log" 2>&1 < /dev/null &
  local tenth
  for ((tenth = 0; tenth < 100; tenth++)); do
    if [ -s "$run/pid" ] || [ -s "$run/exit" ]; then break; fi
    sleep 0.1
  done
  [ "$tenth" -lt 100 ] || fail "the run has not started: $run/log may say why"
  echo "$(hostname): launched"
}

train() {  # outlives the connection: notes the status with which train.py ends
  local status=0
  cd "$code"
  printf -- '--- %s: python train.py%s\n' "$(date)" "$(printf ' %q' "$@")"
  PYTHONUNBUFFERED=1 "$venv/bin/python" train.py "$@" &
  echo $! > "$run/pid"
  wait $! || status=$?
  echo "--- train.py ended with status $status"
  echo $status > "$run/exit"
}

state() {
  if running; then echo "state: running"
  elif [ -e "$run/stopped" ]; then echo "state: stopped"
  elif [ -s "$run/exit" ]; then echo "state: ended $(cat "$run/exit")"
  elif [ -s "$run/pid" ]; then echo "state: lost"  # this worker was restarted, or the process killed
  elif [ -x "$venv/bin/python" ]; then echo "state: idle"
  else echo "state: absent"
  fi
}

logs() {
  [ -e "$run/log" ] || fail "there is no log yet: tpu/pod launch first"
  tail -n 100 -F "$run/log"
}

stop() {  # SECONDS [by-hand]: SIGTERM, so that train.py saves a checkpoint; what is left after SECONDS is killed
  # Tells tpu/pod watch not to start it again, also where it has failed or not begun yet.
  if [ $# = 2 ] && { running || [ "$(cat "$run/exit" 2> /dev/null)" != 0 ]; }; then mkdir -p "$run"; touch "$run/stopped"; fi
  if ! running; then echo "$(hostname): nothing runs"; return; fi
  local pid tenth
  pid=$(cat "$run/pid")
  kill -TERM "$pid"
  for ((tenth = 0; tenth < 10 * $1; tenth++)); do
    if ! running; then echo "$(hostname): stopped"; return; fi
    sleep 0.1
  done
  kill -KILL "$pid"
  echo "$(hostname): killed: it had not ended $1 s after SIGTERM, and its last steps may not be saved"
}

cd "$HOME"
"$@"
