#!/usr/bin/env bash
# Runs on each worker. tpu/pod copies this file to the home folder of every worker and calls it there:
# bash worker.sh install | idle | launch TRAIN-OPTION... | state | logs | stop SECONDS [by-hand]
# shellcheck disable=SC2329  # the last line calls the functions by name
set -euo pipefail
code=$HOME/layerskip_jax         # the repository as of the last install
venv=$HOME/layerskip_jax_venv
run=$HOME/layerskip_jax_run      # files: pid (of train.py), exit (its status), stopped (by tpu/pod stop), log,
                                 # installed (names of the installed files)

fail() {
  printf 'error: %s: %s\n' "$(hostname)" "$1" >&2
  exit 1
}

running() {  # checks the process too: after a restart of the worker, another program may have the pid in the file
  [ -s "$run/pid" ] && ps -p "$(cat "$run/pid")" -o args= 2> /dev/null | grep -q 'train\.py'
}

idle() {
  if running; then fail "a run is active on this worker (process $(cat "$run/pid")): stop it with tpu/pod stop"; fi
}

install() {
  idle
  mkdir -p "$code" "$run"
  # Remove the files of the last install that the new one lacks. Other files stay: runs and data may be there too.
  tar -tzf layerskip_jax.tar.gz | LC_ALL=C sort > "$run/installing"
  if [ -e "$run/installed" ]; then
    LC_ALL=C comm -23 "$run/installed" "$run/installing" | while IFS= read -r file; do
      if [ -f "$code/$file" ]; then rm -f "$code/$file"; fi
    done
  fi
  tar -xzf layerskip_jax.tar.gz -C "$code"
  mv "$run/installing" "$run/installed"
  # The pinned jax needs Python 3.12, and TPU images with Ubuntu 22.04 have 3.10: uv downloads its own Python.
  # On Ubuntu 24.04 pip refuses even a --user install without PIP_BREAK_SYSTEM_PACKAGES; an older pip ignores it.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv ||
    fail "pip could not install uv: see its message above"
  [ -x "$venv/bin/python" ] || python3 -m uv venv --quiet --python 3.12 "$venv" ||
    fail "uv could not install Python 3.12: see its message above"
  python3 -m uv pip install --quiet --python "$venv/bin/python" --constraint "$code/tpu/requirements.txt" \
    --editable "${code}[tpu]" || fail "uv could not install the package: see its message above"
  echo "$(hostname): installed"
}

launch() {
  idle
  [ -x "$venv/bin/python" ] || fail "the package is not installed on this worker: run tpu/pod install first"
  rm -f "$run/pid" "$run/exit" "$run/stopped"
  nohup bash "$0" train "$@" >> "$run/log" 2>&1 < /dev/null &
  local tenth
  for ((tenth = 0; tenth < 100; tenth++)); do
    if [ -s "$run/pid" ] || [ -s "$run/exit" ]; then break; fi
    sleep 0.1
  done
  [ "$tenth" -lt 100 ] || fail "the run has not started within 10 s: see $run/log"
  echo "$(hostname): launched"
}

train() {  # keeps running after the ssh connection ends, and records the exit status of train.py
  local status=0
  cd "$code"
  printf -- '--- %s: python train.py%s\n' "$(date)" "$(printf ' %q' "$@")"
  PYTHONUNBUFFERED=1 "$venv/bin/python" train.py "$@" &
  echo $! > "$run/pid"
  wait $! || status=$?
  echo "--- train.py ended with status $status"
  echo "$status" > "$run/exit"
}

state() {
  # `train` writes the exit status a moment after train.py has ended: wait for it before reporting the run as lost.
  if ! running && [ -s "$run/pid" ] && [ ! -s "$run/exit" ]; then sleep 1; fi
  if running; then echo "state: running"
  elif [ -e "$run/stopped" ]; then echo "state: stopped"
  elif [ -s "$run/exit" ]; then
    local status error=''
    status=$(cat "$run/exit")
    # The last error after the last launch: the log also has those of earlier runs.
    [ "$status" = 0 ] || error=$(awk '/^--- .*: python train.py/ { last = "" } /^([A-Za-z_.]*Error|error): / { last = $0 }
      END { print substr(last, 1, 200) }' "$run/log" 2> /dev/null) || true
    echo "state: ended $status${error:+ ($error)}"
  elif [ -s "$run/pid" ]; then echo "state: lost"  # the worker was restarted, or this script was killed
  elif [ -x "$venv/bin/python" ]; then echo "state: idle"
  else echo "state: absent"
  fi
}

logs() {
  [ -e "$run/log" ] || fail "there is no log yet: run tpu/pod launch first"
  tail -n 100 -F "$run/log"
}

stop() {  # SECONDS [by-hand]: sends SIGTERM, on which train.py saves a checkpoint; after SECONDS, SIGKILL
  # by-hand tells tpu/pod watch not to launch the run again, even if the run has failed or has not started.
  if [ $# = 2 ] && { running || [ "$(cat "$run/exit" 2> /dev/null)" != 0 ]; }; then mkdir -p "$run"; touch "$run/stopped"; fi
  if ! running; then echo "$(hostname): no run is active"; return; fi
  local pid tenth
  pid=$(cat "$run/pid")
  kill -TERM "$pid" 2> /dev/null || true  # it may just have ended
  for ((tenth = 0; tenth < 10 * $1; tenth++)); do
    if ! running; then echo "$(hostname): stopped"; return; fi
    sleep 0.1
  done
  kill -KILL "$pid" 2> /dev/null || true
  echo "$(hostname): killed: still running $1 s after SIGTERM, so its last steps may not be saved"
}

cd "$HOME"
# One line, because bash reads a script as it runs, and `tpu/pod install` may replace this file meanwhile.
"$@"; exit
