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
all="LN BN GN RMS DyT Derf ISRU RepBN Post DeepNorm ResPost Peri LNS Keel LayerScale ReZero SkipInit
    Rescale RescaleNet TFixup SigmaReparam"

for norm in ${NORMS:-$all}; do
    for rate in ${RATES:-0.005 0.01 0.02 0.04}; do
        train --name rates --dataset "$dataset" --recipe "$recipe" --norm_type "$norm" \
            --learning_rate "$rate" --val_split "${HELD_OUT:-5000}" --resume "$@"
    done
done

for norm in ${NORMS:-$all}; do
    logs="output/${dataset}_*_norm_${norm}_*_rates*.txt"
    # shellcheck disable=SC2086  # a pattern of file names
    best=$("${PYTHON:-python3}" "$(dirname "$0")/results.py" --best_rates $logs) || continue
    for seed in ${SEEDS:-42 43 44}; do
        train --name seeds --dataset "$dataset" --recipe "$recipe" --norm_type "$norm" \
            --learning_rate "${best##* }" --seed "$seed" --resume "$@"
    done
done

echo "$0: $failed of $count trainings failed"
[ $failed = 0 ]
