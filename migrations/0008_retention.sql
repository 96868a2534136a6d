-- What retention needs: to find what is old without reading what is not, and to tell everyone that a run is being removed.
ALTER TABLE runs ADD COLUMN pruned_since timestamptz;

COMMENT ON COLUMN runs.pruned_since IS 'When retention began to remove the run. Its rows go first and this one last, so from then on it cannot be retried or published again.';

-- The end of a run. A failed one has none of its own: its last sign of work stands in for it.
CREATE INDEX runs_by_end ON runs ((coalesce(completed_at, cancelled_at, begun_at, opened_at)))
    WHERE state <> 'running';

CREATE INDEX outbox_by_sending ON outbox (sent_at) WHERE sent_at IS NOT NULL;
