-- What operators need of a run: to see how fast it goes, to cancel it, to let it go on.
ALTER TABLE runs
    ADD COLUMN event_data           text,
    ADD COLUMN cancel_requested_at  timestamptz,
    ADD COLUMN cancelled_at         timestamptz,
    ADD COLUMN progressed_at        timestamptz,
    ADD COLUMN rate_since           timestamptz,
    ADD COLUMN rate_since_rows      bigint,
    ADD COLUMN next_rate_since      timestamptz,
    ADD COLUMN next_rate_since_rows bigint,
    DROP CONSTRAINT runs_state_check,
    ADD CONSTRAINT runs_state_check CHECK (state IN ('running', 'complete', 'cancelled', 'failed')),
    ADD CONSTRAINT runs_cancelled_at_check CHECK ((state = 'cancelled') = (cancelled_at IS NOT NULL)),
    -- Completion and cancel exclude each other; the database has the last word.
    ADD CONSTRAINT runs_cancel_requested_check
        CHECK (CASE state WHEN 'complete' THEN cancel_requested_at IS NULL
                          WHEN 'cancelled' THEN cancel_requested_at IS NOT NULL
                          ELSE true END);

-- The newest runs are shown first.
CREATE INDEX runs_by_opening ON runs (opened_at DESC, run_id);

COMMENT ON COLUMN runs.state IS 'running: work is left. complete: every selected listing is terminal and post-processing is in the outbox. cancelled: stopped by an operator, goes on when retried. failed: given up; nothing sets it yet.';
COMMENT ON COLUMN runs.event_data IS 'The event''s data, byte by byte, to send it again; null in runs opened before this column was.';
COMMENT ON COLUMN runs.cancel_requested_at IS 'When an operator asked for the end of the run; from then on it cannot become complete. Null: nobody did.';
COMMENT ON COLUMN runs.cancelled_at IS 'When the last work on the cancelled run had ended; null unless it is cancelled.';
COMMENT ON COLUMN runs.progressed_at IS 'When the last batch was committed; null before the first.';
COMMENT ON COLUMN runs.rate_since IS 'The recent rate is counted from here: the beginning of the attempt, or of the last but one stretch of 15 s.';
COMMENT ON COLUMN runs.rate_since_rows IS 'Terminal listings at rate_since.';
COMMENT ON COLUMN runs.next_rate_since IS 'What rate_since will be 15 s from here, so that the recent rate covers 15 to 30 s.';
COMMENT ON COLUMN runs.next_rate_since_rows IS 'Terminal listings at next_rate_since.';

COMMENT ON COLUMN outbox.event_id IS 'Id of the row. That of a publish event is the event''s own, derived from what it announces, so that a second insert is none; a refresh that is sent again keeps its event''s id in the body and has a fresh one here.';
