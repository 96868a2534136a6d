-- When a publication was given up: `status` and the audit tell since when, and retention counts from there.
ALTER TABLE publications ADD COLUMN failed_at timestamptz;

-- The last sign of work stands in for it. A service from before this column sets none, so none is demanded.
UPDATE publications SET failed_at = coalesce(begun_at, opened_at) WHERE state = 'failed';

COMMENT ON COLUMN publications.failed_at IS 'When the publication was quarantined last, of which last_error has the reason; null if it never was. It may have gone on since: state tells.';
