-- What the work on a publication has used, as runs have it. A service from before this column sets none, so none is
-- demanded.
ALTER TABLE publications ADD COLUMN used jsonb;

COMMENT ON COLUMN publications.used IS 'What all attempts have used together, as of the last page or end: bytes, polls, microseconds. Of an attempt that died, what came after its last page is not in it.';
