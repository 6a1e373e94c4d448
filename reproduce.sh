#!/bin/sh
# The first 200 steps of the reference's own command, for its four norm types, and their figure.
#
#     REFERENCE=../RescaleViT/output sh reproduce.sh
#
# REFERENCE is the folder with the reference's result logs; without it, only the trainings run. One
# takes about 20 minutes on two cores with bf16 units. Logs go to reproduced/, the figure to
# img/plot_acc_loss/reference.png. What was stopped goes on from its checkpoint. Flags are passed on
# to every training; NORMS, OUTPUT and PYTHON replace what is below.
set -eu

# shellcheck source=utils/sweep.sh
. "$(dirname "$0")/utils/sweep.sh"

output=${OUTPUT:-reproduced}

for norm in ${NORMS:-LN BN GN Rescale}; do
    train --name cifar10-100_500 --dataset cifar10 --norm_type "$norm" --model_type ViT-B_32 --fp16 \
        --fp16_opt_level O2 --stop_after 200 --output_dir "$output" --resume "$@"
done

runs=cifar10_ViT-B_32_norm_*_fp_True_img_224_pretrain_F
# shellcheck disable=SC2086  # patterns of file names
[ -z "${REFERENCE-}" ] || "${PYTHON:-python3}" "$(dirname "$0")/plot_acc_loss.py" \
    "$output"/${runs}_cifar10-100_500*.txt --reference "$REFERENCE"/$runs.txt

echo "$0: $failed of $count trainings failed"
[ $failed = 0 ]
