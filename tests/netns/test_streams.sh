#!/bin/bash
# 32 streams, half of them sampled, while a worker is killed, frozen, cut off, drained or stopped: every one ends with exactly the text and the digest
# that it has undisturbed. Order and outcome are asserted; how long it took is printed.
# usage: test_streams.sh BUILD-DIRECTORY
. "$(dirname "$0")/net.sh"

cluster_up
N=32
TOKENS=${TOKENS:-120}

# stream I LAYOUT...: one of them; text and the line with its digest go to files
stream() {
    local i=$1
    local -a how=(--temp 0)
    shift
    [ $((i % 2)) = 0 ] || how=(--temp 0.9 --top-p 0.95 --seed "$i")
    ip netns exec "$NET-c" "$BUILD/tools/weft/weft" run "$MODEL" -p "story number $i" -n "$TOKENS" -c 1024 "${how[@]}" "$@" >"$DIR/$i.out" 2>"$DIR/$i.err"
}
declare -a RUNNING=()
streams_begin() {
    local i
    RUNNING=()
    for ((i = 0; i < N; i++)); do
        : >"$DIR/$i.out"
        stream $i "$@" &
        RUNNING[i]=$!
    done
}
begun() {
    local i n=0
    for ((i = 0; i < N; i++)); do [ ! -s "$DIR/$i.out" ] || n=$((n + 1)); done
    [ $n -ge "$1" ]
}
# All end well; the files are compared with, or become, those that are named *.WHAT
streams_end() { # WHAT compare|keep
    local i disturbed=0
    for ((i = 0; i < N; i++)); do
        wait "${RUNNING[i]}" || fail "$1: stream $i ended with $?: $(tail -n 3 "$DIR/$i.err")"
        sed -n 's/.*digest //p' "$DIR/$i.err" | tail -n 1 >"$DIR/$i.digest"
        [ -s "$DIR/$i.digest" ] || fail "$1: stream $i has no digest: $(tail -n 3 "$DIR/$i.err")"
        if [ "$2" = keep ]; then
            mv "$DIR/$i.out" "$DIR/$i.text.want"
            mv "$DIR/$i.digest" "$DIR/$i.digest.want"
            continue
        fi
        cmp -s "$DIR/$i.digest" "$DIR/$i.digest.want" || fail "$1: stream $i has digest $(cat "$DIR/$i.digest"), not $(cat "$DIR/$i.digest.want"): $(cat "$DIR/$i.err")"
        cmp -s "$DIR/$i.out" "$DIR/$i.text.want" || fail "$1: stream $i has another text"
        ! grep -q "goes on in epoch" "$DIR/$i.err" || disturbed=$((disturbed + 1))
    done
    [ "$2" = keep ] || [ $disturbed -gt 0 ] || fail "$1: no stream was disturbed"
    [ "$2" = keep ] || ok "$1: $N streams, $disturbed of them disturbed: $(grep -h "goes on in epoch" "$DIR"/*.err | sort -t' ' -k7 | tail -n 1)"
}
all_back() { until_true 60 members_are "$serving_or_ready" w1 w2 w3 || fail "$1: not all came back: $(weft status)"; }

# the answers, undisturbed, on one worker: the same for every layout
streams_begin --dp 1 --pp 1 --tp 1
streams_end undisturbed keep

layout="--dp 1 --pp 2 --tp 1"
for harm in kill freeze cut drain stop; do
    # shellcheck disable=SC2086
    streams_begin $layout
    until_true 60 begun 4 || fail "$harm: the streams did not begin: $(cat "$DIR/0.err")"
    [ $harm = kill ] && which=0 || which=1
    until_true 30 find_victim $which || fail "nobody serves: $(weft status)"
    case $harm in
        kill) worker_kill "$victim" KILL ;;
        freeze) worker_kill "$victim" STOP ;;
        cut) cable "$victim" down ;;
        drain) weft drain "$victim" || fail "drain says $?" ;;
        stop) worker_kill "$victim" TERM ;;
    esac
    streams_end "$victim, $harm" compare
    case $harm in
        kill) wait "${PID[$victim]}" 2>/dev/null; worker_start "$victim" ;;
        freeze) worker_kill "$victim" CONT ;;
        cut) cable "$victim" up ;;
        drain) weft undrain "$victim" || fail "undrain says $?" ;;
        stop)
            wait "${PID[$victim]}" || fail "$victim ended with $? on SIGTERM"
            until_true 20 grep -q "worker $victim lost (was draining): it was stopped" "$DIR/coordinator.log" || fail "$victim did not say goodbye"
            worker_start "$victim"
            ;;
    esac
    [ $harm = drain ] || until_true 20 grep -q "worker $victim lost" "$DIR/coordinator.log" || fail "$victim was never lost"
    all_back "$harm"
done

# two at once; too little is left for the layout until one is back
# shellcheck disable=SC2086
streams_begin $layout
until_true 60 begun 4 || fail "the streams did not begin: $(cat "$DIR/0.err")"
for i in 0 1; do two[i]=$(part $i); done
for victim in "${two[@]}"; do worker_kill "$victim" KILL; done
wait "${PID[${two[0]}]}" "${PID[${two[1]}]}" 2>/dev/null
for victim in "${two[@]}"; do worker_start "$victim"; done
streams_end "${two[*]}, killed at once" compare
all_back "two killed"
