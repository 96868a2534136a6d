-- Attempts count work that was begun. A death is an attempt that nobody ended: its process died or its handler panicked,
-- which the next one finds out by what is still there of it.
ALTER TABLE runs
    ADD COLUMN begun_at     timestamptz,
    ADD COLUMN deaths       integer NOT NULL DEFAULT 0 CHECK (deaths >= 0),
    ADD COLUMN deaths_since timestamptz;

COMMENT ON COLUMN runs.begun_at IS 'When the last attempt was begun; null before the first, and in runs last begun before this column was.';
COMMENT ON COLUMN runs.deaths IS 'Attempts in a row that died without progress; 0 again with each committed row and when the run is retried. Three make the run failed.';
COMMENT ON COLUMN runs.deaths_since IS 'When the first of these was begun; null without one.';
COMMENT ON COLUMN runs.attempts IS 'How often work on the run was begun; a claim that is repeated because its answer was lost is one.';
COMMENT ON COLUMN runs.state IS 'running: work is left. complete: every selected listing is terminal and post-processing is in the outbox. cancelled: stopped by an operator, goes on when retried. failed: quarantined after too many deaths, goes on when retried.';

-- The publisher's token in runs says who publishes the run; which of its publications that is, is known only here.
ALTER TABLE publications
    ADD COLUMN owner        uuid,
    ADD COLUMN begun_at     timestamptz,
    ADD COLUMN deaths       integer NOT NULL DEFAULT 0 CHECK (deaths >= 0),
    ADD COLUMN deaths_since timestamptz,
    DROP CONSTRAINT publications_state_check,
    ADD CONSTRAINT publications_state_check CHECK (state IN ('running', 'complete', 'failed'));

COMMENT ON COLUMN publications.state IS 'running: records are left. complete: every valuation has its delivery report. failed: quarantined after too many deaths.';
COMMENT ON COLUMN publications.owner IS 'Token of the attempt that works on the publication, as in runs.publisher. Null: nobody.';
COMMENT ON COLUMN publications.begun_at IS 'When the last attempt was begun; null before the first, and in those last begun before this column was.';
COMMENT ON COLUMN publications.deaths IS 'Attempts in a row that died without moving the cursor; three make the publication failed.';
COMMENT ON COLUMN publications.deaths_since IS 'When the first of these was begun; null without one.';
COMMENT ON COLUMN publications.attempts IS 'How often work on the publication was begun; a claim that is repeated because its answer was lost is one.';

-- Messages that were received before, from the beginning of their handling to its end. A fast event that is delivered for
-- the first time, as nearly all are, is not in it.
CREATE TABLE deliveries (
    message_id   text        PRIMARY KEY,
    lane         text        NOT NULL,
    token        uuid,
    begun_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    deaths       integer     NOT NULL DEFAULT 0 CHECK (deaths >= 0),
    deaths_since timestamptz
);

-- What is left of messages that are gone is found by its age.
CREATE INDEX deliveries_by_age ON deliveries (begun_at);

COMMENT ON TABLE deliveries IS 'One row a message that is being handled for at least the second time, or died while it was. Removed when a handling ends in order.';
COMMENT ON COLUMN deliveries.message_id IS 'SQS''s id of the message.';
COMMENT ON COLUMN deliveries.lane IS 'The lane that it came from.';
COMMENT ON COLUMN deliveries.token IS 'Token of the handling that was begun and has not ended. Null: a death was counted, and the next handling has not begun.';
COMMENT ON COLUMN deliveries.begun_at IS 'When the last handling was begun.';
COMMENT ON COLUMN deliveries.deaths IS 'Handlings in a row that died. Three send the message to the dead-letter queue.';
COMMENT ON COLUMN deliveries.deaths_since IS 'When the first of these was begun; null without one.';

-- What a listing.upsert event said when it was first applied, so that another event with its id is told from a repeat.
CREATE TABLE listing_events (
    event_id   text COLLATE "C" PRIMARY KEY,
    digest     bytea            NOT NULL,
    applied_at timestamptz      NOT NULL DEFAULT clock_timestamp()
);

-- Old rows are found by their age.
CREATE INDEX listing_events_by_age ON listing_events (applied_at);

COMMENT ON TABLE listing_events IS 'One row a listing.upsert event; written with the listing, or instead of it where a newer event was there already.';
COMMENT ON COLUMN listing_events.event_id IS 'Id of the event; the first event with an id wins.';
COMMENT ON COLUMN listing_events.digest IS 'SHA-256 over source, type and canonical data of the event.';
COMMENT ON COLUMN listing_events.applied_at IS 'When the event was applied.';
