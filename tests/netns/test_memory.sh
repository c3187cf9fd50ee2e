#!/bin/bash
# Every worker in a memory cgroup of 1.1 times its planned peak loads, answers and is not killed: no whole file, no second copy of the weights.
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
    rmdir /sys/fs/cgroup/weft-netns-$$-* /sys/fs/cgroup/memory/weft-netns-$$-* 2>/dev/null
}
trap ungroup EXIT
trial=$(group trial 67108864) 2>/dev/null || skip "memory cgroups cannot be made here"
rmdir "$(dirname "$trial")"

MODEL_SIZE=large
cluster_up
plan=$(weft plan "$MODEL" --tp 3 -c 512 --json 2>"$DIR/plan.err") || fail "no plan: $(cat "$DIR/plan.err")"
mapfile -t peaks < <(grep -o '"peak_bytes": *[0-9]*' <<<"$plan" | grep -o '[0-9]*$')
mapfile -t names < <(grep -o '"worker": *"w[0-9]*"' <<<"$plan" | grep -o 'w[0-9]')
[ "${#peaks[@]}" = 3 ] && [ "${#names[@]}" = 3 ] || fail "the plan names ${#names[@]} workers and ${#peaks[@]} peaks"
want=$(digest_of --tp 3 -c 512)
[ "$want" ] || fail "no digest: $(cat "$DIR/run.err")"

declare -A groups=()
for i in 0 1 2; do
    name=${names[$i]}
    worker_kill "$name" TERM
    wait "${PID[$name]}"
    rm -rf "${DIR:?}/$name/cache" # what it holds must come over the network again, within the limit
    limit=$((peaks[i] * 11 / 10))
    groups[$name]=$(group "$name" "$limit")
    GROUP=${groups[$name]} worker_start "$name" --memory "${peaks[$i]}"
    echo "$name: planned peak ${peaks[$i]}, limit $limit"
done
until_true 30 members_are "$serving_or_ready" w1 w2 w3 || fail "the workers did not come back: $(weft status)"
for turn in 1 2; do
    got=$(digest_of --tp 3 -c 512)
    for name in "${names[@]}"; do echo "$name: highest use $(highest "${groups[$name]}")"; done
    [ "$got" = "$want" ] || fail "under the limit, turn $turn: digest '$got', not '$want': $(cat "$DIR/run.err")"
done
for name in "${names[@]}"; do kill -0 "${PID[$name]}" || fail "$name was killed"; done
ok "three workers within 1.1 x their planned peaks"
