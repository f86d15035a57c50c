#!/bin/sh
# Sets up and runs every check: format, lints, tests. The last line is the test runner's own summary.
#
# Needs Rust 1.95 or newer, best by rustup, and git. On Debian it installs the packages below that are missing, with apt-get (as root or
# with sudo), and rustfmt and clippy with rustup; it says so before. Downloads crates on the first run. No protoc, no open port; the tests
# start the servers that they need in temporary folders.
#
#   gcc, libc6-dev    the linker that Rust needs, and the compiler of the C parts: SQLite, ring, mimalloc
#   ca-certificates   cargo downloads over TLS
#   postgresql        the programs of a server: initdb, postgres, pg_ctl, pg_basebackup, psql
#   pgbouncer         a pooler in front of it
#   util-linux        setpriv: PostgreSQL refuses to run as root (part of every Debian)
#
# CI=true, and the version of Rust that Cargo.toml names: format and lints are errors. With a newer Rust they are shown and do not end
# the run, because its rustfmt and clippy know rules that did not exist when this was written.
set -eu
cd "$(dirname "$0")"

say() { printf 'test.sh: %s\n' "$*"; }
fail() { say "$*" >&2; exit 69; }
has() { PATH="$PATH:/usr/sbin" command -v "$1" >/dev/null 2>&1; }

# Rust first: without it nothing else is worth installing.
if ! has cargo && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
  PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
  say "cargo is not on the PATH: taking ${CARGO_HOME:-$HOME/.cargo}/bin"
fi
known=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
has cargo || fail "no cargo: install Rust $known or newer from https://rustup.rs, then run this again; nothing was installed"
rust=$(rustc --version) || fail "cargo is there but rustc does not run: try \`rustup default stable\`; nothing was installed"
rust=$(printf '%s\n' "$rust" | cut -d ' ' -f 2)
printf '%s\n%s\n' "$known" "$rust" | sort -C -V || fail "Rust $rust is too old, $known is needed: rustup update; nothing was installed"
strict=false
case "$rust" in "$known" | "$known".*) strict=true ;; esac
[ "${CI:-}" != true ] || strict=true

packages=
has cc || packages="$packages gcc libc6-dev"
[ -n "${SSL_CERT_FILE:-}${CARGO_HTTP_CAINFO:-}" ] || [ -e /etc/ssl/certs/ca-certificates.crt ] || [ ! -e /etc/debian_version ] ||
  packages="$packages ca-certificates"
has initdb || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || packages="$packages postgresql"
has pgbouncer || packages="$packages pgbouncer"
[ "$(id -u)" -ne 0 ] || has setpriv || packages="$packages util-linux"
if [ -n "$packages" ]; then
  has apt-get || fail "missing, and there is no apt-get to install them (names of Debian's packages):$packages"
  as_root=
  if [ "$(id -u)" -ne 0 ]; then
    has sudo || fail "missing: as root, run \`apt-get install$packages\`, for there is no sudo; then run this again"
    as_root=sudo
  fi
  say "installing with apt-get:$packages"
  case "$packages" in *postgresql*)
    # Debian's package makes a database cluster `main` and starts a server on it, at once and at every boot, unless this file says that
    # it must not. The tests make servers of their own, so nobody needs that one. The file stays; delete it before you set up a server.
    if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
      say "writing /etc/postgresql-common/createcluster.conf, so that the package sets up no database and starts no server"
      $as_root mkdir -p /etc/postgresql-common
      echo "create_main_cluster = false" | $as_root tee /etc/postgresql-common/createcluster.conf >/dev/null
    fi
    ;;
  esac
  case "$packages" in *pgbouncer*)
    [ ! -d /run/systemd/system ] ||
      say "Debian starts a pooler as a service, on port 6432 of the loopback address; \`systemctl disable --now pgbouncer\` ends it"
    ;;
  esac
  $as_root apt-get update
  # The file above is kept, not asked about.
  # shellcheck disable=SC2086
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends -o Dpkg::Options::=--force-confold $packages
fi
for tool in rustfmt clippy; do
  subcommand=$tool
  [ "$tool" = rustfmt ] && subcommand=fmt
  if ! cargo "$subcommand" --version >/dev/null 2>&1; then
    has rustup || fail "no $tool, and no rustup to install it: install it as you installed Rust"
    say "no $tool: installing it with rustup"
    rustup component add "$tool"
  fi
done

# Suites of others (published vectors) are read where they lie and not copied. The tests of one that is absent are left out, and the
# summary counts them as filtered out; CI=true demands all of them.
skip=
suite() { # name, variable with its folder, its tests
  name=$1 variable=$2
  shift 2
  folder=$(printenv "$variable" || printf '../shared/%s' "$name")
  if [ "${CI:-}" != true ] && [ ! -d "$folder" ]; then
    say "suite \`$name\` is NOT run: there is no folder $folder ($variable names another); its tests count as filtered out"
    for tests in "$@"; do skip="$skip --skip $tests"; done
  fi
}
suite vectors PORTCULLIS_VECTORS aat:: cli::the_drafts_vectors_by_command
suite agentdojo PORTCULLIS_AGENTDOJO agentdojo::

if [ "$strict" = true ]; then
  say "format";  cargo fmt --check
  say "lints";   cargo clippy --locked --all-targets -- -D warnings
else
  say "Rust $rust is newer than $known: format and lints are shown and do not end the run (CI=true makes them errors)"
  say "format";  cargo fmt --check || say "rustfmt of Rust $rust differs: see above"
  say "lints";   cargo clippy --locked --all-targets -- --cap-lints warn
fi
say "examples in the documentation"
cargo test --locked --doc
say "tests"
# shellcheck disable=SC2086
cargo test --locked --lib --bins --test it --test memory -- $skip
