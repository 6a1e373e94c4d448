#!/bin/sh
# The reference's 20 trainings on CIFAR-10: each model with LN from ./pretrain/{model}.npz, then
# with LN, BN, GN and Rescale from scratch. 20,000 steps each, half precision, one GPU.
#
#     sh train1.sh
#
# Flags are passed on to every training. What is finished is skipped, and what is not goes on from
# its checkpoint. A training that fails is reported, and the next one starts; Ctrl-C ends the sweep.
# MODELS, PYTHON, DATASET and GPU replace what is below.
#
# Time on one RTX 3090: the reference took 38.0 hours for the 16 trainings that it published. The
# other four are ViT-L_16 from scratch; its pretrained one took 5.1 hours.
set -eu

dataset=${DATASET:-cifar10}
# shellcheck source=utils/sweep.sh
. "$(dirname "$0")/utils/sweep.sh"

for model in ${MODELS:-ViT-B_16 ViT-B_32 ViT-L_32 ViT-L_16}; do
    batch=128
    if [ "$model" = ViT-L_16 ]; then batch=64; fi
    for norm in "LN --pretrained_dir ./pretrain/$model.npz" LN BN GN Rescale; do
        # shellcheck disable=SC2086  # the first of them is several words
        train --name "$dataset-100_500" --dataset "$dataset" --model_type "$model" \
            --norm_type $norm --train_batch_size $batch --learning_rate 0.05 \
            --fp16 --fp16_opt_level O2 --gpu_id "${GPU:-0}" --resume "$@"
    done
done

echo "$0: $failed of $count trainings failed"
[ $failed = 0 ]
