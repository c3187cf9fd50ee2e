#!/bin/bash
# Every worker in a memory cgroup of 1.1 times its planned peak loads, answers and is not killed: no whole file, no second copy of the weights.
# One worker, two and three, cut both ways.
# usage: test_memory.sh BUILD-DIRECTORY
. "$(dirname "$0")/net.sh"

# cgroup NAME BYTES: makes a group with that limit and prints the file that takes process ids; both generations of cgroups
group() {
    local name=weft-netns-$$-$1
    if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
        mkdir "/sys/fs/cgroup/$name" && echo "$2" >"/sys/fs/cgroup/$name/memory.max" && echo 0 >"/sys/fs/cgroup/$name/memory.swap.max" || return 1
        echo "/sys/fs/cgroup/$name/cgroup.procs"
    elif [ -d /sys/fs/cgroup/memory ]; then
        mkdir "/sys/fs/cgroup/memory/$name" && echo "$2" >"/sys/fs/cgroup/memory/$name/memory.limit_in_bytes" || return 1
        echo "/sys/fs/cgroup/memory/$name/cgroup.procs"
    else
        return 1
    fi
}
highest() { cat "$(dirname "$1")/memory.peak" 2>/dev/null || cat "$(dirname "$1")/memory.max_usage_in_bytes" 2>/dev/null || echo unknown; }
ungroup() {
    cleanup
    [ "$BASHPID" = $$ ] || return
    rmdir /sys/fs/cgroup/weft-netns-$$-* /sys/fs/cgroup/memory/weft-netns-$$-* 2>/dev/null
}
trap ungroup EXIT
trial=$(group trial 67108864) 2>/dev/null || skip "memory cgroups cannot be made here"
rmdir "$(dirname "$trial")"

MODEL_SIZE=large
cluster_up
want=$(digest_of --tp 3 -c 512)
[ "$want" ] || fail "no digest: $(cat "$DIR/run.err")"

# under_limits RANKS LAYOUT...: only the plan's workers run, each with its planned peak as --memory and 1.1 times that as the group's limit
under_limits() {
    local ranks=$1 plan name i limit turn got
    shift
    for name in w1 w2 w3; do # as they were at first: the plan sees all of them
        worker_kill "$name" TERM
        wait "${PID[$name]}"
        worker_start "$name"
    done
    until_true 30 members_are "$serving_or_ready" w1 w2 w3 || fail "the workers did not come back: $(weft status)"
    plan=$(weft plan "$MODEL" "$@" -c 512 --json 2>"$DIR/plan.err") || fail "no plan: $(cat "$DIR/plan.err")"
    local -a peaks names
    mapfile -t peaks < <(grep -o '"peak_bytes": *[0-9]*' <<<"$plan" | grep -o '[0-9]*$')
    mapfile -t names < <(grep -o '"worker": *"w[0-9]*"' <<<"$plan" | grep -o 'w[0-9]')
    [ "${#peaks[@]}" = "$ranks" ] && [ "${#names[@]}" = "$ranks" ] || fail "the plan names ${#names[@]} workers and ${#peaks[@]} peaks"
    for name in w1 w2 w3; do
        worker_kill "$name" TERM
        wait "${PID[$name]}"
    done
    local -A groups=()
    for ((i = 0; i < ranks; i++)); do
        name=${names[$i]}
        rm -rf "${DIR:?}/$name/cache" # what it holds must come over the network again, within the limit
        limit=$((peaks[i] * 11 / 10))
        groups[$name]=$(group "${*//[ -]/}-$name" "$limit")
        GROUP=${groups[$name]} worker_start "$name" --memory "${peaks[$i]}"
        echo "$*: $name: planned peak ${peaks[$i]}, limit $limit"
    done
    until_true 30 members_are "$serving_or_ready" "${names[@]}" || fail "the workers did not come back: $(weft status)"
    for turn in 1 2; do
        got=$(digest_of "$@" -c 512)
        for name in "${names[@]}"; do echo "$name: highest use $(highest "${groups[$name]}")"; done
        [ "$got" = "$want" ] || fail "$*, under the limit, turn $turn: digest '$got', not '$want': $(cat "$DIR/run.err")"
    done
    for name in "${names[@]}"; do kill -0 "${PID[$name]}" || fail "$name was killed"; done
    ok "$*: $ranks workers within 1.1 x their planned peaks"
    for name in w1 w2 w3; do [ -v "groups[$name]" ] || worker_start "$name"; done
}
under_limits 3 --tp 3
under_limits 2 --tp 2 --pp 1
under_limits 2 --pp 2 --tp 1
under_limits 1 --pp 1 --tp 1
