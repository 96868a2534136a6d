# Sourced by the scripts beside this directory: installs what is missing on a fresh Debian machine and leaves alone what
# is there. With apt where it may be used (root), else it names what is missing.

# Cargo compiles a dependency with the features that any target of a command needs, those of tests included (tokio's paused
# clock). Programs are therefore built beside one test: then their dependencies are those of the tests, and not a second copy
# that takes minutes. The test is one of the local stack's, which needs nothing of the service.
AS_FOR_TESTS=(--locked --workspace --test restarts)

need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 && return
    install_package "$2" "$1"
}

install_package() { # install_package PACKAGE WHAT_IS_MISSING
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing $1 ($2 is missing)"
        if [ -z "${APT_UPDATED:-}" ]; then
            # One archive of several may be away; whether the package can be had, the installation shows.
            apt-get update -qq || true
            APT_UPDATED=1
        fi
        # What apt says matters only if it fails.
        local said
        if ! said=$(DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" 2>&1); then
            printf '%s\n' "$said" >&2
            echo "$2 is missing and apt-get could not install Debian's package $1: install it and try again" >&2
            exit 1
        fi
    else
        echo "$2 is missing: install Debian's package $1 and try again" >&2
        exit 1
    fi
}

prerequisites() {
    if ! command -v cargo >/dev/null 2>&1 && [ -x "$HOME/.cargo/bin/cargo" ]; then
        PATH="$HOME/.cargo/bin:$PATH"
    fi
    if ! command -v cargo >/dev/null 2>&1; then
        echo "cargo is missing: install Rust 1.95 or newer and try again" >&2
        exit 1
    fi
    # librdkafka and jemalloc are built from their sources by configure and make.
    need gcc gcc
    need g++ g++
    need make make
    # librdkafka speaks TLS by the system's OpenSSL. Its headers are found by pkg-config, as the build finds them.
    need pkg-config pkg-config
    pkg-config --exists openssl || install_package libssl-dev "OpenSSL's development package"
    need python3 python3
    # The local SQS runs in a virtual environment, and so does PostgreSQL where the machine has no server of its own.
    # Debian's python3 has venv but not the pip that it puts inside.
    python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || install_package python3-venv "python3 -m venv"
}

need_component() { # need_component COMPONENT COMMAND: a part of Rust that small installations lack
    command -v "$2" >/dev/null 2>&1 && cargo "${2#cargo-}" --version >/dev/null 2>&1 && return
    if command -v rustup >/dev/null 2>&1; then
        echo "installing $1 ($2 is missing)"
        rustup --quiet component add "$1"
    else
        echo "$2 is missing: install Rust's component $1 and try again" >&2
        exit 1
    fi
}

target_directory() { # target_directory WORKSPACE: where cargo builds to, by its settings; a relative one is the caller's
    cargo metadata --manifest-path "$1/Cargo.toml" --no-deps --locked --format-version 1 |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])'
}
