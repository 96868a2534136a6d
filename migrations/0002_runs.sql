-- The durable record of working on slow events: what was selected, how far it got, who works on it.
CREATE TABLE runs (
    run_id                 text        PRIMARY KEY,
    digest                 bytea       NOT NULL,
    event_source           text        NOT NULL,
    event_time             timestamptz NOT NULL,
    traceparent            text,
    zip_codes              integer[],
    row_limit              bigint      CHECK (row_limit >= 0),
    state                  text        NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'complete')),
    last_listing_id        bigint      NOT NULL,
    selected               bigint      NOT NULL,
    cursor                 bigint      NOT NULL DEFAULT '-9223372036854775808',
    valued                 bigint      NOT NULL DEFAULT 0,
    failed                 bigint      NOT NULL DEFAULT 0,
    attempts               integer     NOT NULL DEFAULT 0,
    owner                  uuid,
    lease_until            timestamptz,
    publisher              uuid,
    publisher_lease_until  timestamptz,
    last_error             text,
    opened_at              timestamptz NOT NULL DEFAULT clock_timestamp(),
    completed_at           timestamptz,
    CHECK ((state = 'complete') = (completed_at IS NOT NULL))
);

COMMENT ON TABLE runs IS 'One row a valuations.refresh event.';
COMMENT ON COLUMN runs.run_id IS 'Id of the refresh event; the first event with an id wins.';
COMMENT ON COLUMN runs.digest IS 'SHA-256 over source, type and canonical data of the event: tells a repeat from another event with the same id.';
COMMENT ON COLUMN runs.event_source IS 'CloudEvents source of the event.';
COMMENT ON COLUMN runs.event_time IS 'CloudEvents time; with run_id, the version of the listing_valuations that the run writes.';
COMMENT ON COLUMN runs.traceparent IS 'W3C trace context of the event; passed on to Kafka.';
COMMENT ON COLUMN runs.zip_codes IS 'The zip codes asked for, sorted; null for all.';
COMMENT ON COLUMN runs.row_limit IS 'The most listings asked for; null for all.';
COMMENT ON COLUMN runs.state IS 'running: work is left. complete: every selected listing is terminal and post-processing is in the outbox.';
COMMENT ON COLUMN runs.last_listing_id IS 'Upper bound of the set, fixed at the opening: the id of the last (or limit-th) match.';
COMMENT ON COLUMN runs.selected IS 'Matches counted at the opening.';
COMMENT ON COLUMN runs.cursor IS 'Low-water mark: every listing of the set up to and including this id has its row in valuations.';
COMMENT ON COLUMN runs.valued IS 'Listings with a valuation; moves in the transaction that writes them.';
COMMENT ON COLUMN runs.failed IS 'Listings that the partner refused for good; moves in the transaction that writes them.';
COMMENT ON COLUMN runs.attempts IS 'How often work on the run was begun.';
COMMENT ON COLUMN runs.owner IS 'Token of the attempt that works on the run; a write with another token is refused. Null: nobody.';
COMMENT ON COLUMN runs.lease_until IS 'Until when, by the clock of this database, the owner keeps the run without renewal.';
COMMENT ON COLUMN runs.publisher IS 'Token of the attempt that publishes the run: one at a time. Null: nobody.';
COMMENT ON COLUMN runs.publisher_lease_until IS 'Until when the publisher keeps the run without renewal.';
COMMENT ON COLUMN runs.last_error IS 'Why the last attempt ended early; null after progress.';
COMMENT ON COLUMN runs.opened_at IS 'When the set was fixed.';
COMMENT ON COLUMN runs.completed_at IS 'When the last listing became terminal; the time of the Kafka records.';

-- The partner's answers. No foreign key to runs: each insert is in a transaction that holds the run's row locked, and
-- a check per row would cost more than the row.
CREATE TABLE valuations (
    run_id           text    NOT NULL,
    listing_id       bigint  NOT NULL,
    zip_code         integer NOT NULL,
    list_price_cents bigint  NOT NULL,
    valuation_cents  bigint,
    confidence       double precision,
    failure          text,
    PRIMARY KEY (run_id, listing_id),
    CHECK ((failure IS NULL) = (valuation_cents IS NOT NULL AND confidence IS NOT NULL))
);

COMMENT ON TABLE valuations IS 'The terminal state of one listing in one run; never updated.';
COMMENT ON COLUMN valuations.run_id IS 'The run.';
COMMENT ON COLUMN valuations.listing_id IS 'The listing.';
COMMENT ON COLUMN valuations.zip_code IS 'Zip code that the partner was asked about.';
COMMENT ON COLUMN valuations.list_price_cents IS 'Asking price in US cents that the partner was asked about.';
COMMENT ON COLUMN valuations.valuation_cents IS 'The partner''s valuation in US cents; null if it failed.';
COMMENT ON COLUMN valuations.confidence IS 'The partner''s confidence, 0 to 1; null if it failed.';
COMMENT ON COLUMN valuations.failure IS 'Why there is no valuation; null if there is one.';

-- The newest valuation of each listing, narrow because every refresh rewrites it.
CREATE TABLE listing_valuations (
    listing_id      bigint           PRIMARY KEY,
    run_id          text COLLATE "C" NOT NULL,
    event_time      timestamptz      NOT NULL,
    valuation_cents bigint           NOT NULL,
    confidence      double precision NOT NULL
) WITH (fillfactor = 70);

COMMENT ON TABLE listing_valuations IS 'One row a listing that was ever valued; the newest run by (event_time, run_id) wins.';
COMMENT ON COLUMN listing_valuations.listing_id IS 'The listing.';
COMMENT ON COLUMN listing_valuations.run_id IS 'The run that the valuation is from; breaks ties of event_time.';
COMMENT ON COLUMN listing_valuations.event_time IS 'Time of that run''s event.';
COMMENT ON COLUMN listing_valuations.valuation_cents IS 'The valuation in US cents.';
COMMENT ON COLUMN listing_valuations.confidence IS 'The partner''s confidence, 0 to 1.';

-- One row a valuations.publish event. A run may be published again under a new event id, with a cursor of its own.
CREATE TABLE publications (
    event_id     text        PRIMARY KEY,
    digest       bytea       NOT NULL,
    run_id       text        NOT NULL REFERENCES runs (run_id),
    state        text        NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'complete')),
    cursor       bigint      NOT NULL DEFAULT '-9223372036854775808',
    published    bigint      NOT NULL DEFAULT 0,
    attempts     integer     NOT NULL DEFAULT 0,
    last_error   text,
    opened_at    timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz,
    CHECK ((state = 'complete') = (completed_at IS NOT NULL))
);

CREATE INDEX publications_by_run ON publications (run_id);

COMMENT ON TABLE publications IS 'Post-processing of a run: how far its valuations were published to Kafka.';
COMMENT ON COLUMN publications.event_id IS 'Id of the publish event.';
COMMENT ON COLUMN publications.digest IS 'SHA-256 over source, type and canonical data of the event.';
COMMENT ON COLUMN publications.run_id IS 'The run whose valuations are published.';
COMMENT ON COLUMN publications.state IS 'running: records are left. complete: every valuation has its delivery report.';
COMMENT ON COLUMN publications.cursor IS 'Every valuation up to and including this listing id has its delivery report.';
COMMENT ON COLUMN publications.published IS 'Records with a delivery report, counted once however often they were sent.';
COMMENT ON COLUMN publications.attempts IS 'How often work on the publication was begun.';
COMMENT ON COLUMN publications.last_error IS 'Why the last attempt ended early; null after progress.';
COMMENT ON COLUMN publications.opened_at IS 'When the event was first worked on.';
COMMENT ON COLUMN publications.completed_at IS 'When the last delivery report was in.';
