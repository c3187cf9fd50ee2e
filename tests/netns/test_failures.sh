#!/bin/bash
# Hosts that die, freeze, are cut off or drained during a request: it goes on elsewhere, or waits until they are back, with the tokens of an
# undisturbed run; who is lost is named; nobody hangs, and the next request runs.
# usage: test_failures.sh BUILD-DIRECTORY
. "$(dirname "$0")/net.sh"

cluster_up
# The requests from here on are of so many tokens; their digest, undisturbed, is the same for every layout.
length() {
    TOKENS=$1
    want=$(weft run "$MODEL" -p "once upon a time" -n "$TOKENS" -c 4096 --tp 1 --json 2>"$DIR/run.err" | json_field digest)
    [ "$want" ] || fail "no digest: $(cat "$DIR/run.err")"
}

# A long request over the layout; returns when it has begun to speak.
talk() {
    : >"$DIR/talk.out"
    # shellcheck disable=SC2086
    ip netns exec "$NET-c" "$BUILD/tools/weft/weft" run "$MODEL" -p "once upon a time" -n "$TOKENS" -c 4096 $1 >"$DIR/talk.out" 2>"$DIR/talk.err" &
    TALK=$!
    until_true 30 test -s "$DIR/talk.out" || fail "the request did not begin: $(cat "$DIR/talk.err")"
    kill -0 "$TALK" || fail "the request ended by itself: $(tail -n 2 "$DIR/talk.err")"
}
told() { grep -q "$1" "$DIR/talk.err"; }
# The request goes on, names one of the workers, and ends with the digest of an undisturbed run.
goes_on() { # WHAT NAMES
    local name found=
    until_true 120 bash -c "! kill -0 $TALK" || fail "$1: the request hangs: $(cat "$DIR/talk.err")"
    wait "$TALK" || fail "$1: the request ended with $?: $(tail -n 2 "$DIR/talk.err")"
    told "goes on in epoch" || fail "$1: the request was not disturbed: $(cat "$DIR/talk.err")"
    for name in $2; do told "\b$name\b" && found=1; done
    [ "$found" ] || fail "$1: none of '$2' is named: $(cat "$DIR/talk.err")"
    told "digest $want" || fail "$1: not digest $want: $(tail -n 1 "$DIR/talk.err")"
    ok "$1: $(grep "goes on in epoch" "$DIR/talk.err" | tail -n 1)"
}
known_lost() { until_true 20 members_are lost "$1" || fail "$1 is not known as lost within 20 s: $(weft status)"; }
all_back() { until_true 60 members_are "$serving_or_ready" w1 w2 w3 || fail "$1: not all came back: $(weft status)"; }
strike() { # HOW WORKER
    case $1 in
    killed) worker_kill "$2" KILL ;;
    frozen) worker_kill "$2" STOP ;;
    "cut off") cable "$2" down ;;
    drained) weft drain "$2" || fail "drain says $?" ;;
    esac
}
mend() { # HOW WORKER
    case $1 in
    killed)
        wait "${PID[$2]}" 2>/dev/null
        worker_start "$2"
        ;;
    frozen)
        known_lost "$2"
        worker_kill "$2" CONT
        ;;
    "cut off")
        known_lost "$2"
        cable "$2" up
        ;;
    drained)
        until_true 10 members_are draining "$2" || fail "$2 does not drain: $(weft status)"
        weft undrain "$2" || fail "undrain says $?"
        ;;
    esac
    all_back "$2 $1"
}
# A request over the layout, one of whose workers is struck. A job also moves to better workers that came back: if it did so just before the
# stroke, that hit a worker which nobody needed any more, and another request is struck.
disturb() { # LAYOUT PART HOW
    local try victim
    for try in 1 2 3; do
        talk "$1"
        until_true 30 find_victim "$2" || fail "nobody serves: $(weft status)"
        strike "$3" "$victim"
        if [ "$try" -lt 3 ] && moved_away "$victim"; then
            mend "$3" "$victim"
            continue
        fi
        goes_on "$victim $3, $1" "$victim"
        mend "$3" "$victim"
        return
    done
}
moved_away() { # WORKER
    until_true 120 bash -c "! kill -0 $TALK" || fail "the request hangs: $(cat "$DIR/talk.err")"
    told "workers came" && ! told "\b$1\b" && told "digest $want"
}

length 1500
for layout in "--tp 2 --pp 1" "--pp 2 --tp 1"; do # a third worker is there to take over
    disturb "$layout" 0 killed
    disturb "$layout" 1 killed
    disturb "$layout" 0 frozen
    disturb "$layout" 1 "cut off"
    disturb "$layout" 0 drained
done

# nobody is left to take over: the request waits for the worker, which is fenced and joins as new
length 500
talk "--tp 3"
worker_kill w2 KILL
until_true 30 told "w2 lost" || fail "the request does not hear of w2: $(cat "$DIR/talk.err")"
wait "${PID[w2]}" 2>/dev/null
worker_start w2
goes_on "w2 killed and started again, --tp 3" w2
all_back "w2 killed"

talk "--pp 3"
worker_kill w3 STOP
until_true 30 told "w3 lost" || fail "the request does not hear of w3: $(cat "$DIR/talk.err")"
worker_kill w3 CONT
goes_on "w3 frozen and thawed, --pp 3" w3
all_back "w3 frozen"

talk "--tp 3"
worker_kill w1 KILL
worker_kill w3 KILL
until_true 30 told "w[13] lost" || fail "the request does not hear of w1 or w3: $(cat "$DIR/talk.err")"
wait "${PID[w1]}" "${PID[w3]}" 2>/dev/null
worker_start w1
worker_start w3
goes_on "w1 and w3 killed at once" "w1 w3"
all_back "two killed"

# most of them are silent: nothing is placed anew, and service resumes when they are back
length 1500
talk "--pp 2 --tp 1"
epochs=$(grep -c "planned:" "$DIR/coordinator.log")
cable w1 down
cable w2 down
cable w3 down
until_true 20 grep -q "fell silent together" "$DIR/coordinator.log" || fail "three cut cables go unnoticed: $(weft status)"
[ "$(grep -c "planned:" "$DIR/coordinator.log")" = "$epochs" ] || fail "planned anew without most workers"
members_are lost w1 || members_are lost w2 || members_are lost w3 && fail "silence of most was taken for death: $(weft status)"
cable w1 up
cable w2 up
cable w3 up
goes_on "all cut off for a while" "w1 w2 w3"
all_back "all cut off"
