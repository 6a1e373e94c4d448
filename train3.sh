#!/bin/sh
# The reference's 20 trainings on CIFAR-100, as train1.sh has them for CIFAR-10, on the second GPU.
#
#     sh train3.sh
#
# Time on one RTX 3090: the reference took 32.4 hours for the 15 trainings that it published. The
# other five are those of ViT-L_16, about 5 hours each.
DATASET=cifar100 GPU=${GPU:-1} exec sh "$(dirname "$0")/train1.sh" "$@"
