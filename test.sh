#!/bin/sh
# Sets up and runs every check: format, lints, tests. The last line is the test runner's own summary.
#
# Needs Rust (rustup) and git. What else is missing it installs, and says so: a C compiler, the programs of a PostgreSQL server and
# pgbouncer with apt-get (as root or with sudo), rustfmt and clippy with rustup. Downloads crates on the first run. No protoc, no open
# port; the tests start the servers they need in temporary folders.
set -eu
cd "$(dirname "$0")"

say() { printf 'test.sh: %s\n' "$*"; }

install() {
  as_root=""
  [ "$(id -u)" -eq 0 ] || as_root=sudo
  $as_root apt-get update
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

if ! command -v cc >/dev/null 2>&1; then
  say "no C compiler: installing gcc, libc6-dev and make with apt-get"
  install gcc libc6-dev make
fi
if ! command -v initdb >/dev/null 2>&1 && ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
  say "no PostgreSQL server: installing postgresql with apt-get; no database is made, and nothing is started"
  # The package would make a database and start it; the tests make their own.
  if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    root=""
    [ "$(id -u)" -eq 0 ] || root=sudo
    $root mkdir -p /etc/postgresql-common
    echo "create_main_cluster = false" | $root tee /etc/postgresql-common/createcluster.conf >/dev/null
  fi
  install postgresql
fi
if ! PATH="$PATH:/usr/sbin" command -v pgbouncer >/dev/null 2>&1; then
  say "no pgbouncer: installing it with apt-get"
  install pgbouncer
fi
for tool in rustfmt clippy; do
  subcommand=$tool
  [ "$tool" = rustfmt ] && subcommand=fmt
  if ! cargo "$subcommand" --version >/dev/null 2>&1; then
    say "no $tool: installing it with rustup"
    rustup component add "$tool"
  fi
done

# Suites of others (published vectors) are read where they lie and not copied: without them the tests say so and go on, save
# where CI=true, which demands them.
for suite in vectors:PORTCULLIS_VECTORS agentdojo:PORTCULLIS_AGENTDOJO; do
  name=${suite%:*} variable=${suite#*:}
  if [ ! -d "../shared/$name" ] && ! printenv "$variable" >/dev/null; then
    say "suite \`$name\` is NOT run: there is no ../shared/$name; name its folder with $variable"
  fi
done

say "format";  cargo fmt --check
say "lints";   cargo clippy --locked --all-targets -- -D warnings
say "tests";   cargo test --locked --lib --bins --test it
