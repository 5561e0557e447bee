#!/usr/bin/env bash
# This checkout on every worker of a TPU VM (v4 to v6e), and one run of reasonrl.main across them.
#
#   experiments/tpu_vm.sh create NAME ZONE ACCELERATOR [flags of gcloud, such as --spot]
#   experiments/tpu_vm.sh setup  NAME ZONE           copies the checkout, installs '.[tpu,hf]'
#   experiments/tpu_vm.sh run    NAME ZONE --config=configs/r1_zero.py --workdir=/mnt/shared/a
#   experiments/tpu_vm.sh logs   NAME ZONE           the last lines of every worker
#   experiments/tpu_vm.sh stop   NAME ZONE           SIGTERM: saves and leaves; run again goes on
#   experiments/tpu_vm.sh delete NAME ZONE           of what `create` made
#
# --dry_run in front prints the gcloud commands instead. `create` asks for a queued resource called
# NAME that becomes a TPU VM of the same name; with a VM that you have, begin at `setup`. `run` leaves
# a process that survives the ssh session. On more than one host the workdir must be a folder that
# all of them share, such as a mounted bucket or Filestore. gcloud must know the project
# (`gcloud config set project ...`); git decides what is copied: everything that it does not ignore.
#
# Written from Google's documentation: we have never run this on a TPU. The Cloud TPU API, and so
# this script, does not know TPU7x: there, xpk (Google Kubernetes Engine) starts the same command,
# `python -m reasonrl.main --distributed ...`, in a container.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  echo "error: $*" >&2
  exit 2
}

say=''
if [[ "${1:-}" == --dry_run ]]; then
  say=yes
  shift
fi
[[ $# -ge 3 ]] || die "usage: [--dry_run] create|setup|run|logs|stop|delete NAME ZONE ...; see the head of $0"
what=$1 name=$2 zone=$3
shift 3

gcloud_tpus() {
  set -- gcloud compute tpus "$@" --zone="$zone"
  if [[ ! $say ]]; then
    "$@"
    return
  fi
  for word; do
    [[ $word != *[^A-Za-z0-9_./:=,-]* ]] || word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
    printf '%s ' "$word"
  done
  echo
}

everywhere() {
  gcloud_tpus tpu-vm ssh "$name" --worker=all --command="$1"
}

case $what in
  create)
    [[ $# -ge 1 ]] || die 'create needs an accelerator type, such as v4-32, v5litepod-16, v5p-8, v6e-8'
    case $1 in
      v4-*) image=tpu-ubuntu2204-base ;;
      v5litepod-*) image=v2-alpha-tpuv5-lite ;;
      v5p-*) image=v2-alpha-tpuv5 ;;
      v6e-*) image=v2-alpha-tpuv6e ;;
      *) die "accelerator type '$1' is not one of v4-N, v5litepod-N, v5p-N, v6e-N" ;;
    esac
    gcloud_tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$1" \
      --runtime-version="$image" "${@:2}"
    gcloud_tpus queued-resources describe "$name" # ACTIVE: ready for setup
    ;;
  setup)
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    [[ $say ]] || git ls-files --cached --others --exclude-standard -z \
      | while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done \
      | tar --null -T - -czf "$archive"
    gcloud_tpus tpu-vm scp "$archive" "$name:reasonrl.tar.gz" --worker=all
    # The images have Python 3.10, which is too old; uv brings its own.
    everywhere "mkdir -p reasonrl && tar -xzf reasonrl.tar.gz -C reasonrl && cd reasonrl \
&& python3 -m pip install --quiet --user uv \
&& ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv \
&& ~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu,hf]'"
    ;;
  run)
    [[ " $*" == *' --workdir='* ]] || die 'run needs --workdir=FOLDER, one that all workers share'
    everywhere "cd reasonrl; if kill -0 \$(cat run.pid 2>/dev/null) 2>/dev/null; then \
echo 'a run is there already: see logs, or stop it' >&2; exit 1; fi; \
nohup .venv/bin/python -m reasonrl.main --distributed $(printf '%q ' "$@")\
>>run.log 2>&1 </dev/null & echo \$! >run.pid"
    ;;
  logs)
    everywhere 'hostname; tail -n 20 reasonrl/run.log'
    ;;
  stop)
    everywhere 'pid=$(cat reasonrl/run.pid) && kill $pid && while kill -0 $pid 2>/dev/null; do sleep 1; done'
    ;;
  delete)
    gcloud_tpus queued-resources delete "$name" --force --quiet
    ;;
  *) die "'$what' is not one of create, setup, run, logs, stop, delete" ;;
esac
