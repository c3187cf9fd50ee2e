#!/bin/bash
# Real daemons on hosts with addresses of their own: joining, roles and tokens, layouts with equal digests, health, a coordinator that restarts.
# usage: test_hosts.sh BUILD-DIRECTORY
. "$(dirname "$0")/net.sh"

network_check() { on w1 bash -c 'exec 3<>/dev/tcp/10.83.0.1/7470'; }

# who is let in
cluster_up
ok "three hosts joined"
network_check || fail "w1 cannot reach the coordinator"
[ "$(stat -c %a "$DIR/w1/node.pem")" = 600 ] || fail "the key's file is readable by others"

worker_says() { # EXIT-CODE PATTERN FLAGS...: a fourth worker on w1's host that must end by itself
    local code=$1 pattern=$2 got
    shift 2
    got=$(timeout 20 ip netns exec "$NET-w1" "$BUILD/worker/weft-worker" --state "$DIR/w9" --threads 1 --memory 64M "$@" 2>&1)
    [ $? = "$code" ] || fail "exit code of a worker with $*, wanted $code: $got"
    [[ $got == *$pattern* ]] || fail "a worker with $* says: $got"
    [ "$(grep -vc " warn: grpc: \| info: measured" <<<"$got")" = 1 ] || fail "more than one line: $got"
    rm -rf "$DIR/w9"
}
words=$(token_words 1)
read -r -a word <<<"$words"
token=${word[3]} hash=${word[5]}
worker_says 6 "" --join 10.83.0.1:7471 --token "$token" --ca-hash "sha256:$(printf '0%.0s' {1..64})"
worker_says 6 "" --join 10.83.0.1:7471 --token weft-wrong --ca-hash "$hash"
worker_says 5 "" --join 10.83.0.1:7999 --token "$token" --ca-hash "$hash"
worker_says 2 "" --join 10.83.0.1:7471 --token "$token" --ca-hash "sha256:12"
worker_says 2 "holds no certificate"
cp -r "$DIR/w2" "$DIR/w9"
worker_says 1 "7480" --listen 10.83.0.11:7480 # the port of w1's health listener
cp -r "$DIR/w2" "$DIR/w9"
sed -i 's/^/x/' "$DIR/w9/node.pem"
worker_says 2 "join again"
ok "wrong hash, wrong token, wrong port, damaged state: one line and the documented code"

# one model, the same bits
want=$(digest_of --tp 1)
[ "$want" ] || fail "no digest: $(cat "$DIR/run.err")"
for layout in "--tp 2" "--tp 3" "--pp 2" "--pp 3" "--pp 2 --tp 2" "--dp 3 --tp 1"; do
    # shellcheck disable=SC2086
    got=$(digest_of $layout)
    if [ "$layout" = "--pp 2 --tp 2" ]; then # four ranks on three hosts: an answer, not a layout
        [ -z "$got" ] || fail "four ranks ran on three workers"
        continue
    fi
    [ "$got" = "$want" ] || fail "layout $layout: digest '$got', one worker gives '$want': $(cat "$DIR/run.err")"
    ok "layout $layout: equal digest"
done

# health, earned; from another host and over the plaintext port
on w2 "$BUILD/tools/weft/weft" probe --plain 10.83.0.1:7480 || fail "the coordinator's health port says $?"
on c "$BUILD/tools/weft/weft" probe --plain 10.83.0.11:7480 || fail "w1's health port says $?"
on c "$BUILD/tools/weft/weft" probe 10.83.0.1:7470 || fail "the coordinator's health over mutual TLS says $?"
on w1 "$BUILD/tools/weft/weft" probe --plain 10.83.0.1:7470
[ $? != 0 ] || fail "plaintext was served on the control port"
ok "health over the network"

# a coordinator that is killed and started again finds its workers, and they find it
kill -KILL "${PID[c]}"
wait "${PID[c]}" 2>/dev/null
coordinator_start
until_true 20 members_are "$serving_or_ready" w1 w2 w3 || fail "the workers did not come back: $(weft status)"
got=$(digest_of --tp 3)
[ "$got" = "$want" ] || fail "after the restart: digest '$got', not '$want': $(cat "$DIR/run.err")"
ok "coordinator restarted; workers came back by themselves"

# a worker that is restarted needs no token
worker_kill w2 TERM
wait "${PID[w2]}" || fail "w2 ended with $? on SIGTERM"
worker_start w2
until_true 20 members_are "$serving_or_ready" w1 w2 w3 || fail "w2 did not come back: $(weft status)"
got=$(digest_of --pp 3)
[ "$got" = "$want" ] || fail "after w2's restart: digest '$got', not '$want': $(cat "$DIR/run.err")"
ok "worker restarted without a token"

# an engine that stands still is not serving, within 5 s; and serves again when it goes on
worker_kill w2 TERM
wait "${PID[w2]}"
WEFT_FAILPOINT=engine-hold=file:$DIR/hold worker_start w2
until_true 20 members_are "$serving_or_ready" w1 w2 w3 || fail "w2 did not come back: $(weft status)"
got=$(digest_of --tp 3)
[ "$got" = "$want" ] || fail "before the hold: digest '$got', not '$want': $(cat "$DIR/run.err")"
health_is() { on c "$BUILD/tools/weft/weft" probe --plain 10.83.0.12:7480; [ $? = "$1" ]; }
until_true 3 health_is 0 || fail "w2 with a loaded shard is not serving"
touch "$DIR/hold"
until_true 5 health_is 4 || fail "w2's held engine still counts as serving after 5 s"
rm "$DIR/hold"
digest_again() { [ "$(digest_of --tp 3)" = "$want" ]; }
until_true 20 digest_again || fail "after the hold: no digest $want: $(cat "$DIR/run.err")"
until_true 5 health_is 0 || fail "w2's engine goes on and is not serving"
ok "a held engine is NOT_SERVING within 5 s"

# a full disk costs the cache, not the answer
worker_kill w1 TERM
wait "${PID[w1]}"
rm -rf "${DIR:?}/w1/cache"
mkdir "$DIR/w1/cache"
mount -t tmpfs -o size=256k weft-full "$DIR/w1/cache" || fail "no tmpfs"
worker_start w1
until_true 20 members_are "$serving_or_ready" w1 w2 w3 || fail "w1 did not come back: $(weft status)"
: >"$DIR/w1.log"
got=$(digest_of --tp 3)
umount -l "$DIR/w1/cache"
[ "$got" = "$want" ] || fail "with a full disk: digest '$got', not '$want': $(cat "$DIR/run.err")"
[ "$(grep -c "goes on without caching" "$DIR/w1.log")" = 1 ] || fail "a full disk gave $(grep -c "goes on without caching" "$DIR/w1.log") warnings, not one"
ok "a full disk in the cache: one warning, the same bits"

# revoked: at once, and it says so
weft revoke w3 || fail "revoke says $?"
until_true 10 bash -c "! kill -0 ${PID[w3]}" || fail "a revoked worker goes on"
wait "${PID[w3]}"
[ $? = 6 ] || fail "a revoked worker ends with another code than 6"
ok "revoked worker left with exit code 6"
