#!/bin/sh
# The bench: every norm type with one recipe, the same steps and the same learning rates.
#
#     sh train_small.sh
#
# First each type at four learning rates, evaluated on HELD_OUT training images; where the lowest or
# highest is the best, at up to three more beyond it. Then, at the best rate, each of SEEDS,
# evaluated on the test images. Flags are passed on to every training.
# What is finished is skipped, and what is not goes on from its checkpoint. Diverged runs count as
# failed, and stay in the tables. NORMS, RATES, SEEDS, HELD_OUT, RECIPE, DATASET and PYTHON replace
# what is below. With other flags or held-out images than before, give the sweep a NAME of its own.
# To use two cores well, run it twice at once, with OMP_NUM_THREADS=1 and half of NORMS each.
set -eu

# shellcheck source=utils/sweep.sh
. "$(dirname "$0")/utils/sweep.sh"
dataset=${DATASET:-cifar10} recipe=${RECIPE:-bench} name=${NAME:-${RECIPE:-bench}}
rates=rates seeds=seeds without=
[ "$name" = bench ] || rates=rates_$name seeds=seeds_$name
python=${PYTHON:-python3} here=$(dirname "$0")
names="from models.norms import NORM_TYPES; print(*NORM_TYPES)"
norms=${NORMS:-$(PYTHONPATH=$here "$python" -c "$names")}
# A quarter, a half, once and twice the recipe's learning rate
grid="import sys; from recipes import RECIPES
if '$recipe' not in RECIPES: sys.exit('$0: RECIPE $recipe is none of ' + ', '.join(RECIPES))
rate = RECIPES['$recipe']().learning_rate
print(*(f'{factor * rate:g}' for factor in (0.25, 0.5, 1, 2)))"
grid=${RATES:-$(PYTHONPATH=$here "$python" -c "$grid")} || exit 2

best() {  # a norm type's best learning rate, and the next one if it is the lowest or highest tried
    logs=output/${dataset}_*_norm_$1_*_$rates[,.]*txt
    # shellcheck disable=SC2086  # a pattern of file names
    lines=$("$python" "$here/results.py" --best_rates $logs) || return 1
    [ "$(echo "$lines" | wc -l)" = 1 ] || return 1
    echo "$lines" | cut -d " " -f 2-
}

try_rate() {
    train --name $rates --dataset "$dataset" --recipe "$recipe" --norm_type "$norm" \
        --learning_rate "$rate" --val_split "${HELD_OUT:-5000}" --resume "$@"
}

for norm in $norms; do
    for rate in $grid; do
        try_rate "$@"
    done
    [ -z "${RATES-}" ] || continue
    for _ in 1 2 3; do
        rate=$(best "$norm") || break
        rate=$(echo "$rate" | cut -s -d " " -f 2)
        [ -z "$rate" ] || try_rate "$@"
    done
done

for norm in $norms; do
    rate=$(best "$norm") || without="$without $norm"
    rate=$(echo "$rate" | cut -d " " -f 1)
    for seed in ${SEEDS:-42 43 44}; do
        [ -z "$rate" ] || train --name $seeds --dataset "$dataset" --recipe "$recipe" \
            --norm_type "$norm" --learning_rate "$rate" --seed "$seed" --resume "$@"
    done
done

echo "$0: $failed of $count trainings failed"
[ -z "$without" ] || echo "$0: no best learning rate, or those of several sweeps (NAME):$without" >&2
[ $failed = 0 ] && [ -z "$without" ]
