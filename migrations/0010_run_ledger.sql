-- What the work on a run has used, which `status` shows. A service from before this column sets none, so none is demanded.
ALTER TABLE runs ADD COLUMN used jsonb;

COMMENT ON COLUMN runs.used IS 'What all attempts have used together, as of the last batch or end: bytes, polls, microseconds. Of an attempt that died, what came after its last batch is not in it.';
