#!/bin/sh
# The README's tour: keys, a policy, a server, a delegation, a decision, a kill. Leaves nothing behind.
#
#   sh examples/tour.sh            after `cargo build --release`
#   PORTCULLIS=path sh examples/tour.sh
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
portcullis=${PORTCULLIS:-$root/target/release/portcullis}
[ -x "$portcullis" ] || { echo "no $portcullis: cargo build --release" >&2; exit 69; }
work=$(mktemp -d)
cd "$work"
server=
trap 'if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi; rm -rf "$work"' EXIT
run() { printf '\n$ portcullis %s\n' "$*"; "$portcullis" "$@" || echo "(exit $?)"; }
part() { sed "s/.*\"$1\":\"\([^\"]*\)\".*/\1/"; }

# An issuer signs who delegates what; the agent proves with its own key that it is the one who calls.
"$portcullis" token keygen --out issuer.jwk >issuer.pub
"$portcullis" token keygen --out agent.jwk >agent.pub

# The four agents' policy, with these two keys in place of the published ones.
cp -r "$root/examples/policies/four-agents" policies
sed -i "s/x: 11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo/x: $(part x <issuer.pub)/" policies/identities.yaml
sed -i "/^id: .*sales-assistant\$/,/^keys:/s|^keys:.*|keys: [$(part thumbprint <agent.pub)]|" policies/agents.yaml
run policy check policies

# Free ports, so that the tour disturbs nothing. `serve` alone takes 7700 to 7702.
"$portcullis" serve --policies policies --listen 127.0.0.1:0 --http-listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 >ready 2>log &
server=$!
until [ -s ready ]; do kill -0 "$server" 2>/dev/null || { cat log >&2; exit 1; }; sleep 0.1; done
address() { tr ' ' '\n' <ready | sed -n "s|^$1=|http://|p"; }
decisions=$(address decisions) admin=$(address admin)

# User ana authorizes the sales assistant, as application crm-portal, for one task in one session, for an hour.
cat >claims.json <<JSON
{"iss": "https://login.acme.example", "aud": "https://gateway.acme.example",
 "sub": "ana", "sub_profile": "user", "groups": ["sales"], "client_id": "crm-portal", "sid": "session-1", "txn": "task-1",
 "act": {"iss": "https://login.acme.example", "sub": "spiffe://acme.example/agent/sales-assistant"},
 "cnf": {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "$(part x <agent.pub)"}},
 "exp": $(($(date +%s) + 3600)), "del_max_depth": 1,
 "authorization_details": [{"type": "attenuating_agent_token", "tools": {
   "crm/leads.read": {},
   "proposals/draft.create": {"discount": {"constraint_type": "range", "min": 0, "max": 20}}}}]}
JSON
"$portcullis" token issue --key issuer.jwk --claims claims.json >chain.jws
"$portcullis" token prove --key agent.jwk --chain chain.jws --tool crm/leads.read --args '{"id":7}' \
  --audience https://gateway.acme.example >proof.jws
printf '{"aat_chain":["%s"],"aat_pop":"%s"}\n' "$(cat chain.jws)" "$(cat proof.jws)" >p.json

run token inspect p.json
run check --presentation p.json --tool crm/leads.read --args '{"id":7}' --target "$decisions"
run tools --presentation p.json --key agent.jwk --target "$decisions"
run explain --presentation p.json --tool proposals/draft.create --args '{"discount":16}' --target "$decisions"
run explain --presentation p.json --tool proposals/draft.create --args '{"discount":16}' --documents --target "$admin"
run revoke agent spiffe://acme.example/agent/sales-assistant --reason "leaked key" --wait fleet --target "$admin"
run fleet status --target "$admin"
run check --presentation p.json --tool crm/leads.read --args '{"id":7}' --target "$decisions"
run reinstate agent spiffe://acme.example/agent/sales-assistant --reason "key rotated" --target "$admin"
run revocations --target "$admin"
