# For the sweeps: `train FLAGS` runs train.py, counts failures, and ends where one is interrupted.
count=0 failed=0

train() {
    count=$((count + 1)) status=0
    "${PYTHON:-python3}" "$(dirname "$0")/train.py" "$@" || status=$?
    case $status in
        0) ;;
        130 | 143) exit "$status" ;; # interrupted or terminated
        *)
            failed=$((failed + 1))
            echo "$0: failed with status $status: train.py $*" >&2
            ;;
    esac
}
