# Sourced by scripts/demo and scripts/test: installs what is missing on a fresh Debian machine and leaves alone what is
# there. With apt where it may be used (root), else it names what is missing.

need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 && return
    install_package "$2" "$1"
}

install_package() { # install_package PACKAGE WHAT_IS_MISSING
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing $1 ($2 is missing)"
        if [ -z "${APT_UPDATED:-}" ]; then
            apt-get update -qq
            APT_UPDATED=1
        fi
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >/dev/null
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
    need python3 python3
    # The local SQS runs in a virtual environment.
    python3 -c 'import ensurepip' >/dev/null 2>&1 || install_package python3-venv "python3 -m venv"
}
