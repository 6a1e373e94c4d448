#!/bin/sh
# The bench: every norm type with one recipe, the same steps and the same learning rates.
#
#     sh train_small.sh
#
# First each type at each of RATES, evaluated on HELD_OUT training images; then, at the rate that was
# best there, each of SEEDS, evaluated on the test images. Flags are passed on to every training.
# What is finished is skipped, and what is not goes on from its checkpoint. Diverged runs count as
# failed, and stay in the tables. NORMS, RATES, SEEDS, HELD_OUT, RECIPE, DATASET and PYTHON replace
# what is below. To use two cores well, run it twice at once, with OMP_NUM_THREADS=1 and half of
# NORMS each.
set -eu

# shellcheck source=utils/sweep.sh
. "$(dirname "$0")/utils/sweep.sh"
dataset=${DATASET:-cifar10} recipe=${RECIPE:-bench}
python=${PYTHON:-python3} here=$(dirname "$0")
names="from models.norms import NORM_TYPES; print(*NORM_TYPES)"
norms=${NORMS:-$(PYTHONPATH=$here "$python" -c "$names")}

for norm in $norms; do
    for rate in ${RATES:-0.005 0.01 0.02 0.04}; do
        train --name rates --dataset "$dataset" --recipe "$recipe" --norm_type "$norm" \
            --learning_rate "$rate" --val_split "${HELD_OUT:-5000}" --resume "$@"
    done
done

for norm in $norms; do
    logs="output/${dataset}_*_norm_${norm}_*_rates*.txt"
    # shellcheck disable=SC2086  # a pattern of file names
    best=$("$python" "$here/results.py" --best_rates $logs) || continue
    for seed in ${SEEDS:-42 43 44}; do
        train --name seeds --dataset "$dataset" --recipe "$recipe" --norm_type "$norm" \
            --learning_rate "${best##* }" --seed "$seed" --resume "$@"
    done
done

echo "$0: $failed of $count trainings failed"
[ $failed = 0 ]
