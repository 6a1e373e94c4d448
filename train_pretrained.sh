#!/bin/sh
# Which norm types can use pretrained weights? Each from DINOv2's, and from scratch, the same steps.
#
#     sh train_pretrained.sh
#
# 0.065 PFLOP a run. Flags are passed on to every training. What is finished is skipped, and what is
# not goes on from its checkpoint. NORMS, DATASETS and PYTHON replace what is below.
set -eu

# shellcheck source=utils/sweep.sh
. "$(dirname "$0")/utils/sweep.sh"

for dataset in ${DATASETS:-cifar10 cifar100}; do
    for norm in ${NORMS:-LN BN GN RMS DyT LayerScale Rescale RescaleNet}; do
        for weights in "--pretrained_dir auto" ""; do
            # shellcheck disable=SC2086  # two words, or none
            train --name tuned --dataset "$dataset" --recipe finetune --norm_type "$norm" $weights \
                --fp16 --num_steps 128 --warmup_steps 6 --eval_every 128 --resume "$@"
        done
    done
done

echo "$0: $failed of $count trainings failed"
[ $failed = 0 ]
