-- The set of a run that was asked for by zip codes. Listings move from one zip code to another, so which ones matched at the
-- opening cannot be found out later. Written once, by the statement that opens the run.
CREATE TABLE run_listings (
    run_id     text   NOT NULL,
    listing_id bigint NOT NULL,
    PRIMARY KEY (run_id, listing_id)
);

COMMENT ON TABLE run_listings IS 'One row a listing of a run by zip codes; runs over all listings have none, their bound tells the set.';
COMMENT ON COLUMN run_listings.run_id IS 'The run.';
COMMENT ON COLUMN run_listings.listing_id IS 'A listing that had one of the run''s zip codes when the run was opened.';

COMMENT ON COLUMN runs.selected IS 'Matches counted at the opening; never changed, so that it can be held against valued and failed.';
