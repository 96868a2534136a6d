-- Homes for sale, kept current by listing.upsert events and read page by page by valuations.refresh.
CREATE TABLE listings (
    listing_id         bigint           PRIMARY KEY,
    zip_code           integer          NOT NULL,
    list_price_cents   bigint           NOT NULL CHECK (list_price_cents >= 0),
    bedrooms           smallint         NOT NULL CHECK (bedrooms >= 0),
    living_square_feet integer          NOT NULL CHECK (living_square_feet >= 0),
    listed_on          date,
    bathrooms          real,
    lot_square_feet    integer,
    floors             real,
    waterfront         boolean,
    view_rating        smallint,
    condition_rating   smallint,
    grade_rating       smallint,
    year_built         smallint,
    year_renovated     smallint,
    latitude           double precision,
    longitude          double precision,
    description        text,
    attributes         jsonb,
    event_time         timestamptz      NOT NULL,
    event_id           text COLLATE "C" NOT NULL,
    created_at         timestamptz      NOT NULL DEFAULT clock_timestamp()
);

-- Real listings carry their text with them: kept inline, so that a page of rows costs what it costs in production.
ALTER TABLE listings ALTER COLUMN description SET STORAGE MAIN, ALTER COLUMN attributes SET STORAGE MAIN;

-- A refresh of some zip codes reads each code in the order of its listing ids.
CREATE INDEX listings_by_zip_code ON listings (zip_code, listing_id);

COMMENT ON TABLE listings IS 'One row a home for sale; the newest listing.upsert event by (event_time, event_id) wins.';
COMMENT ON COLUMN listings.listing_id IS 'Given by the producer; pages are read in its order. The columns from listed_on to attributes are null until an event brings them.';
COMMENT ON COLUMN listings.zip_code IS 'US zip code as a number.';
COMMENT ON COLUMN listings.list_price_cents IS 'Asking price in US cents.';
COMMENT ON COLUMN listings.bedrooms IS 'Number of bedrooms.';
COMMENT ON COLUMN listings.living_square_feet IS 'Living area in square feet.';
COMMENT ON COLUMN listings.listed_on IS 'Day on which the home came to the market.';
COMMENT ON COLUMN listings.bathrooms IS 'Number of bathrooms; a toilet without a bath counts a half or a quarter.';
COMMENT ON COLUMN listings.lot_square_feet IS 'Area of the lot in square feet.';
COMMENT ON COLUMN listings.floors IS 'Number of floors, halves allowed.';
COMMENT ON COLUMN listings.waterfront IS 'Whether the home overlooks water.';
COMMENT ON COLUMN listings.view_rating IS 'Quality of the view, 0 to 4.';
COMMENT ON COLUMN listings.condition_rating IS 'Condition of the home, 1 to 5.';
COMMENT ON COLUMN listings.grade_rating IS 'Grade of construction and design, 1 to 13.';
COMMENT ON COLUMN listings.year_built IS 'Year of construction.';
COMMENT ON COLUMN listings.year_renovated IS 'Year of the last renovation, 0 if there was none.';
COMMENT ON COLUMN listings.latitude IS 'Degrees north.';
COMMENT ON COLUMN listings.longitude IS 'Degrees east.';
COMMENT ON COLUMN listings.description IS 'The text of the advertisement, about 1.5 KB.';
COMMENT ON COLUMN listings.attributes IS 'What the columns do not hold, about 400 bytes.';
COMMENT ON COLUMN listings.event_time IS 'Time of the event that wrote the row; with event_id, the version that a newer event must exceed.';
COMMENT ON COLUMN listings.event_id IS 'Id of the event that wrote the row; breaks ties of event_time.';
COMMENT ON COLUMN listings.created_at IS 'When the listing was first seen; a run takes only listings that were there when it opened.';
