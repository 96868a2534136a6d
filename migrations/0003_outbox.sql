-- Events to send to SQS, written in the transaction of the result that they announce.
CREATE TABLE outbox (
    event_id      uuid        PRIMARY KEY,
    lane          text        NOT NULL,
    body          text        NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    claimed_by    uuid,
    claimed_until timestamptz,
    sent_at       timestamptz
);

-- Only what waits is looked for, in the order of its making.
CREATE INDEX outbox_waiting ON outbox (created_at) WHERE sent_at IS NULL;

COMMENT ON TABLE outbox IS 'Events that exist if and only if the result that they announce was committed.';
COMMENT ON COLUMN outbox.event_id IS 'Id of the event, derived from what it announces, so that a second insert is none.';
COMMENT ON COLUMN outbox.lane IS 'The lane that the event goes to.';
COMMENT ON COLUMN outbox.body IS 'The CloudEvents document.';
COMMENT ON COLUMN outbox.created_at IS 'When the result was committed.';
COMMENT ON COLUMN outbox.claimed_by IS 'The relay that is sending the row; null: nobody.';
COMMENT ON COLUMN outbox.claimed_until IS 'After this another relay may take the row: its first one must have died.';
COMMENT ON COLUMN outbox.sent_at IS 'When SQS accepted the event; null while it waits.';
