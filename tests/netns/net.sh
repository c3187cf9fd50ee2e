# shellcheck shell=bash
# Four hosts as network namespaces, and the real daemons on them. Sourced by the tests of this folder.
#
#                        +---------------- $NET-sw: bridge0 -------------------+
#                        |  to-c          to-w1          to-w2          to-w3   |
#                        +---|--------------|--------------|--------------|-----+
#                  veth pair |         veth |         veth |         veth |
#                       eth0 |         eth0 |         eth0 |         eth0 |
#                  +---------+--+  +--------+---+ +--------+---+ +--------+---+
#                  |  $NET-c    |  |  $NET-w1   | |  $NET-w2   | |  $NET-w3   |
#                  | 10.83.0.1  |  | 10.83.0.11 | | 10.83.0.12 | | 10.83.0.13 |
#                  | coordinator|  | worker w1  | | worker w2  | | worker w3  |
#                  +------------+  +------------+ +------------+ +------------+
#
# Nothing of it is visible outside: the bridge has a namespace of its own, and no namespace has a way to the host. Everything that a test
# waits for is a state that it asks for; only the asking has a pause.

set -u
BUILD=$1
NET=weft$$
DIR=$(mktemp -d /tmp/weft-netns-XXXXXX)
export WEFT_STATE=$DIR UCX_TLS=tcp
declare -A PID=()

skip() { echo "skipped: $1"; exit 77; }
[ "$(id -u)" = 0 ] || skip "network namespaces need root"
command -v ip >/dev/null || skip "no ip command (iproute2)"
ip netns add "$NET-sw" 2>/dev/null || skip "this system lets nobody make network namespaces"
ip netns exec "$NET-sw" true 2>/dev/null || { ip netns del "$NET-sw"; skip "this system lets nobody run in a network namespace (ip netns exec mounts /sys)"; }

address_of() { case $1 in c) echo 10.83.0.1 ;; w*) echo "10.83.0.1${1#w}" ;; esac }
on() { local host=$1; shift; ip netns exec "$NET-$host" "$@"; }

# A child of this shell that is hit by a signal before it has become its program runs the trap, too.
cleanup() {
    local name
    [ "$BASHPID" = $$ ] || return
    for name in "${!PID[@]}"; do kill -KILL "${PID[$name]}" 2>/dev/null; done
    wait 2>/dev/null
    for name in c w1 w2 w3 sw; do ip netns del "$NET-$name" 2>/dev/null; done
    if [ "${KEEP:-}" ]; then echo "state and logs: $DIR"; else rm -rf "$DIR"; fi
}
trap cleanup EXIT

fail() {
    echo "FAILED: $1"
    local log
    for log in "$DIR"/*.log; do echo "== $log"; tail -n 15 "$log"; done
    exit 1
}
ok() { echo "ok: $1"; }

network_up() {
    ip -n "$NET-sw" link add name bridge0 type bridge
    ip -n "$NET-sw" link set bridge0 up
    local host
    for host in c w1 w2 w3; do
        ip netns add "$NET-$host"
        ip -n "$NET-$host" link set lo up
        ip -n "$NET-sw" link add "to-$host" type veth peer name eth0 netns "$NET-$host"
        ip -n "$NET-sw" link set "to-$host" master bridge0 up
        ip -n "$NET-$host" address add "$(address_of "$host")/24" dev eth0
        ip -n "$NET-$host" link set eth0 up
    done
}
# cut and mend a host's cable
cable() { ip -n "$NET-sw" link set "to-$1" "$2"; }

# until SECONDS COMMAND...: asks again and again
until_true() {
    local limit=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $limit ] || return 1
        read -rt 0.1 <> <(:) || :
    done
}

weft() { on c "$BUILD/tools/weft/weft" "$@"; }

# One of those that hold a part of what runs: the leader (0) or another (1); nothing if there is none.
part() { weft status --json 2>/dev/null | tr '{' '\n' | grep '"state": *"serving"' | grep -o '"name": *"w[0-9]"' | grep -o 'w[0-9]' | sed -n "$(($1 + 1))p"; }
# Into $victim; false where there is none, as between a job's move and its next epoch.
find_victim() {
    victim=$(part "$1")
    [ "$victim" ]
}

coordinator_start() {
    ip netns exec "$NET-c" "$BUILD/coordinator/weft-coordinator" --listen 10.83.0.1:7470 --join-listen 10.83.0.1:7471 --health-listen 10.83.0.1:7480 \
        --state "$DIR/coordinator" --models "$DIR/models" >>"$DIR/coordinator.log" 2>&1 &
    PID[c]=$!
    until_true 20 weft status || fail "the coordinator does not answer"
}
# worker_start NAME [FLAGS]: with the flags of the first start (--join ...), or as one that has joined
# GROUP: the file of a cgroup that takes the worker's process id, or empty.
worker_start() {
    local name=$1
    shift
    echo "== start" >>"$DIR/$name.log"
    GROUP=${GROUP:-} bash -c '[ -z "$GROUP" ] || echo $$ >"$GROUP"; exec "$@"' worker ip netns exec "$NET-$name" "$BUILD/worker/weft-worker" --state "$DIR/$name" --cache "$DIR/$name/cache" --name "$name" --threads 1 --memory 1G --link tcp \
        --health-listen "$(address_of "$name"):7480" "$@" >>"$DIR/$name.log" 2>&1 &
    PID[$name]=$!
}
worker_kill() { kill -"$2" "${PID[$1]}"; }
# the words of the line that `weft token create` prints, after the program's name
token_words() { weft token create --uses "$1" 2>/dev/null | grep -o -- '--join.*' | head -n 1; }

member_state() { weft status 2>/dev/null | awk -v name="$1" '$1 == name { print $2 }'; }
# A state that the coordinator still has of the process before this one does not count.
attached() { awk 'BEGIN { a = 1 } /^== start/ { a = 0 } /attached to/ { a = 1 } END { exit !a }' "$DIR/$1.log"; }
member_is() {
    local state
    state=$(member_state "$1")
    [[ " $2 " == *" $state "* ]] || return 1
    case $state in ready | serving) attached "$1" ;; esac
}
members_are() { # STATES NAME...
    local states=$1 name
    shift
    for name; do member_is "$name" "$states" || return 1; done
}
serving_or_ready="ready serving"

cluster_up() {
    network_up
    mkdir "$DIR/models"
    "$BUILD/tests/netns/make-model" "$DIR/models/tiny.gguf" ${MODEL_SIZE:-} || fail "no model could be made"
    MODEL=$DIR/models/tiny.gguf
    coordinator_start
    local words name
    words=$(token_words 3)
    [ "$words" ] || fail "no token line"
    for name in w1 w2 w3; do
        # shellcheck disable=SC2086 # words of a command line
        worker_start $name $words
    done
    until_true 30 members_are "$serving_or_ready" w1 w2 w3 || fail "the workers did not join"
}
# field of a JSON object that is on one line or many
json_field() { grep -o "\"$1\": *\"[^\"]*\"" | head -n 1 | sed 's/.*: *"//; s/"$//'; }
digest_of() { timeout 60 ip netns exec "$NET-c" "$BUILD/tools/weft/weft" run "$MODEL" -p "once upon a time" -n 24 --json "$@" 2>"$DIR/run.err" | json_field digest; }
