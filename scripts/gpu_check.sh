#!/usr/bin/env bash
# What only a GPU can show: one check after the other, each of which may fail, and one table last.
#
#   scripts/gpu_check.sh [--tiny] [--device cuda|cpu] [--out DIR] [--wheels DIR] [NAME ...]
#
#   --tiny        small everywhere: shows within minutes on a CPU that the checks themselves run
#   --device      default: cuda, with --tiny cpu
#   --out DIR     logs and results (default: runs/gpu_check)
#   --wheels DIR  where there is no network: makes DIR/venv on top of this Python's packages and
#                 installs what they lack from DIR; see below
#   NAME ...      these checks only
#
# PYTHON is the interpreter (default: .venv/bin/python, else python3). CIFAR10=FILE names the
# official archive or a folder or tar of images; without it, rendered images take its place.
# CIFAR_MINUTES is that check's budget (default 8).
#
# Without a network: on a machine that has one,
#
#   python3.12 -m pip download --no-deps --only-binary=:all: --dest wheels deepspeed …
#
# for whatever `python -m pip check` misses of pyproject.toml's dependencies beside the torch that the
# GPU's machine has (2.11 or later); carry the folder, and here the script runs
# `pip install --no-index --find-links wheels --no-deps wheels/*.whl`. Packages without wheels are
# built there first: `pip wheel --no-deps deepspeed`.
#
# To add a check, add a line `check NAME SECONDS COMMAND...` below. If the last line that the command
# prints is a JSON object, its numbers are in the table.
set -u
cd "$(dirname "$0")/.."

tiny= device= out=runs/gpu_check wheels= only=
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=1 ;;
        --device) device=$2; shift ;;
        --out) out=$2; shift ;;
        --wheels) wheels=$2; shift ;;
        -h|--help) sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        -*) echo "gpu_check.sh: unknown option $1" >&2; exit 2 ;;
        *) only="$only $1 " ;;
    esac
    shift
done
[ -n "$device" ] || { [ -n "$tiny" ] && device=cpu || device=cuda; }
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ -n "$wheels" ]; then
    [ -x "$wheels/venv/bin/python" ] || "$python" -m venv --system-site-packages "$wheels/venv" || exit 2
    python=$wheels/venv/bin/python
    "$python" -m pip install --quiet --no-index --find-links "$wheels" --no-deps "$wheels"/*.whl || exit 2
fi
mkdir -p "$out" || exit 2
rm -f "$out"/*.log "$out"/results.tsv
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD

# check NAME SECONDS COMMAND...: run it for at most so long, keep its output, go on whatever happens.
check() {
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    [ -z "$only" ] || [[ $only == *" $name "* ]] || return 0
    printf '\n== %s\n$ %s\n' "$name" "$*"
    timeout -k 20 "$limit" "$@" > >(tee "$out/$name.log") 2>&1
    status=$?
    [ $status -ne 124 ] || echo "stopped after $limit s"
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - started))" >> "$out/results.tsv"
}

# Processes: one, and as many more as there are GPUs for. On the last of these come a BatchNorm group
# that spans processes and FSDP sharded within groups, each with communicators of its own.
gpus=2
[ "$device" != cuda ] || gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
worlds=1 most=1
for n in 2 4; do
    [ "$gpus" -lt $n ] || { worlds="$worlds $n"; most=$n; }
done
group=16  # of 16 images a step: all processes; with four, a part of them
[ $most -lt 4 ] || group=8
shared=("$python" scripts/engines.py --device "$device" --worlds $most --handovers)

if [ -n "$tiny" ]; then
    check tests 300 "$python" -m pytest -q tests/unit/test_augment.py -k "gpu or graph or pil_to_the_bit or solarize"
    check engines 300 "$python" scripts/engines.py --device "$device" --worlds $worlds --engines fsdp --precisions fp32 --handovers
    if [ $most -gt 1 ]; then
        check spanning 300 "${shared[@]}" --engines ddp --precisions fp32 --bn-group-size $group
        check hybrid 300 "${shared[@]}" --engines fsdp --precisions fp32 --shard-size $((most / 2))
    fi
    check half 300 "$python" scripts/gpu_check/half.py --device "$device" --tiny
    check step 300 "$python" benchmarks/step.py --device "$device" --quick --batch 4 --size 32 --keys 512 --repeats 1
    check augment 300 "$python" benchmarks/augment.py --device "$device" --quick --batch 2 --size 64 --chains v2 v3 --repeats 1
    check contrast 300 "$python" scripts/gpu_check/contrast.py --device "$device" --tiny
    check cifar10 600 "$python" scripts/gpu_check/cifar10.py --device "$device" --tiny
else
    check tests 600 "$python" -m pytest -q tests/unit tests/distributed/test_inputs.py -m "slow or not slow" -k "gpu or graph or compiled"
    check engines 3000 "$python" scripts/engines.py --device "$device" --worlds $worlds --handovers fp32 fp16
    if [ $most -gt 1 ]; then
        check spanning 1500 "${shared[@]}" --bn-group-size $group
        check hybrid 900 "${shared[@]}" --engines fsdp --shard-size $((most / 2))
    fi
    check half 600 "$python" scripts/gpu_check/half.py --device "$device"
    check step 1500 "$python" benchmarks/step.py --device "$device" --compile --profile
    check augment 900 "$python" benchmarks/augment.py --device "$device"
    check contrast 300 "$python" scripts/gpu_check/contrast.py --device "$device"
    check cifar10 3600 "$python" scripts/gpu_check/cifar10.py --device "$device" \
        --minutes "${CIFAR_MINUTES:-8}" ${CIFAR10:+--source "$CIFAR10"}
fi
"$python" scripts/gpu_check/summary.py "$out"
