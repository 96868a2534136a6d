-- Records that Kafka refuses for good. The others of their page are published, and the publication ends without them.
CREATE TABLE quarantined_records (
    run_id         text        NOT NULL,
    listing_id     bigint      NOT NULL,
    event_id       text        NOT NULL,
    code           text        NOT NULL,
    reason         text        NOT NULL,
    quarantined_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, listing_id)
);

COMMENT ON TABLE quarantined_records IS 'One row a record of a run that is not on Kafka, because Kafka refuses it; gone once another publication of the run has delivered it.';
COMMENT ON COLUMN quarantined_records.run_id IS 'The run whose record it is.';
COMMENT ON COLUMN quarantined_records.listing_id IS 'The listing, which is also the record''s key.';
COMMENT ON COLUMN quarantined_records.event_id IS 'The publish event that met the refusal last.';
COMMENT ON COLUMN quarantined_records.code IS 'The client library''s name of the error: MessageSizeTooLarge, InvalidRecord and so on.';
COMMENT ON COLUMN quarantined_records.reason IS 'The same in words.';
COMMENT ON COLUMN quarantined_records.quarantined_at IS 'When it was refused last.';

ALTER TABLE publications ADD COLUMN quarantined bigint NOT NULL DEFAULT 0;

COMMENT ON COLUMN publications.cursor IS 'Every valuation up to and including this listing id has its delivery report or is quarantined.';
COMMENT ON COLUMN publications.quarantined IS 'Records that Kafka refused for good, counted once; moves in the transaction that writes quarantined_records.';
