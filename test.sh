#!/bin/sh
# Sets up and runs every check: format, lints, tests. The last line is the test runner's own summary.
#
# Needs Rust (rustup) and git. What else is missing it installs, and says so: a C compiler with apt-get (as root or with sudo),
# rustfmt and clippy with rustup. Downloads crates on the first run. No database, no protoc, no open port.
set -eu
cd "$(dirname "$0")"

say() { printf 'test.sh: %s\n' "$*"; }

if ! command -v cc >/dev/null 2>&1; then
  say "no C compiler: installing gcc, libc6-dev and make with apt-get"
  as_root=""
  [ "$(id -u)" -eq 0 ] || as_root=sudo
  $as_root apt-get update
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev make
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
