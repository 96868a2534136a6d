# Two images from one compilation:
#
#   docker build --tag write-api .                                           the service; `write-api serve` by default
#   docker build --tag write-api-partner --target partner-stub .             a partner to try it with, never for production
#
# The service stops within `shutdown.grace` (25 s) of SIGTERM, with everything committed or given back. `docker stop`
# kills after 10 s unless told otherwise: give it 30 (`docker stop --time 30`, or stop_grace_period in Compose).
#
# Nothing here needs BuildKit.

# Where the build's cargo comes from, and gcc, make, pkg-config and OpenSSL's headers, which this image has. Tests put one here that hands over binaries which are built already.
ARG RUST_IMAGE=rust:1.95.0-bookworm

FROM ${RUST_IMAGE} AS build
WORKDIR /build
# The dependencies, compiled for empty crates: this layer is good until a manifest or the lock file changes.
COPY .cargo .cargo/
COPY Cargo.toml Cargo.lock ./
COPY local-stack/Cargo.toml local-stack/
# Members of the workspace that no image needs: they stay empty crates.
COPY bench/Cargo.toml bench/
COPY campaign/Cargo.toml campaign/
RUN mkdir -p src local-stack/src campaign/src bench/src/bars bench/src/before_after examples \
    && touch src/lib.rs local-stack/src/lib.rs campaign/src/lib.rs bench/src/lib.rs \
    && echo 'fn main() {}' | tee src/main.rs local-stack/src/main.rs campaign/src/main.rs bench/src/bars/main.rs \
        bench/src/before_after/main.rs >examples/before.rs \
    && cargo build --release --locked --workspace --bins \
    && rm -r src local-stack/src
COPY . .
# cargo goes by the times of files, and those of the sources may be older than the empty crates.
RUN touch src/lib.rs src/main.rs local-stack/src/lib.rs local-stack/src/main.rs \
    && cargo build --release --locked --workspace --bins

FROM debian:bookworm-slim AS partner-stub
# librdkafka's OpenSSL.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libssl3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /build/target/release/local-stack /usr/local/bin/
# A number, so that a platform can tell without /etc/passwd that it is not root.
USER 10001:10001
EXPOSE 9000
HEALTHCHECK --interval=5s --timeout=2s CMD ["bash", "-c", ": </dev/tcp/127.0.0.1/9000"]
ENTRYPOINT ["local-stack", "partner", "--listen", "0.0.0.0:9000"]

FROM debian:bookworm-slim AS write-api
# The authorities that AWS, the partner, Kafka and Postgres are checked against, and librdkafka's OpenSSL.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libssl3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /build/target/release/write-api /usr/local/bin/
USER 10001:10001
# Health and metrics; profiles, which listen on loopback until profiling.listen says otherwise.
EXPOSE 8080 6060
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["write-api", "health"]
ENTRYPOINT ["write-api"]
CMD ["serve"]
