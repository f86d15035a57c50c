#!/bin/sh
# Asks a running server with ghz: as fast as it goes, the call that does nothing likewise, and at a fixed rate.
#
#   portcullis serve --noop --policies POLICIES &
#   load-tests/ghz/run-ghz.sh PRESENTATION TOOL [ARGUMENTS_JSON] [HOST:PORT]
#
# PRESENTATION is the JSON of a chain, {"aat_chain": [...]}, for a TOOL of proof class `none`: ghz sends one message again
# and again, and a proof is good once. ghz counts a denial as a success, so the answer is looked at before anything is timed.
set -eu
here=$(dirname "$0")
root=$here/../..
presentation=${1:?usage: run-ghz.sh PRESENTATION TOOL [ARGUMENTS_JSON] [HOST:PORT]}
tool=${2:?usage: run-ghz.sh PRESENTATION TOOL [ARGUMENTS_JSON] [HOST:PORT]}
arguments=${3:-'{}'}
target=${4:-127.0.0.1:7700}
command -v ghz >/dev/null || { echo "ghz is not installed: see https://ghz.sh" >&2; exit 69; }
command -v jq >/dev/null || { echo "jq is not installed" >&2; exit 69; }

portcullis=${PORTCULLIS:-portcullis}
"$portcullis" check --presentation "$presentation" --tool "$tool" --args "$arguments" --target "http://$target" >/dev/null

message=$(mktemp)
trap 'rm -f "$message"' EXIT
# Bytes are base64 in JSON.
jq --arg tool "$tool" --arg arguments "$arguments" \
    '{presentation: {aat_chain: [.aat_chain[] | @base64]}, tool: $tool, arguments_json: ($arguments | @base64)}' \
    "$presentation" >"$message"
for config in check noop check-rate; do
    proto=portcullis/v1/decision.proto
    [ "$config" != noop ] || proto=portcullis/v1/noop.proto
    echo "== $config"
    ghz --config "$here/$config.json" --import-paths "$root/proto" --proto "$root/proto/$proto" --data-file "$message" "$target"
done
