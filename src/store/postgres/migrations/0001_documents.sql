-- What replicas share. {schema} is replaced by the schema's name.

CREATE TABLE IF NOT EXISTS {schema}.documents (
    -- 'initialising', 'installation' or 'keyring/NAME'
    document text PRIMARY KEY,
    bytes bytea NOT NULL CHECK (octet_length(bytes) <= 16777216),
    -- Computed here, so that it fits the bytes whoever wrote them.
    digest bytea NOT NULL GENERATED ALWAYS AS (sha256(bytes)) STORED,
    -- From the record's header, for people.
    lineage text,
    generation bigint,
    written_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- One row that every write changes. The random half tells a restored older copy that was written to since from what it
-- was restored from, where the number of changes alone would come to the same value again.
CREATE TABLE IF NOT EXISTS {schema}.state (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    changes bigint NOT NULL,
    last_write uuid NOT NULL
);
INSERT INTO {schema}.state (changes, last_write) VALUES (0, gen_random_uuid()) ON CONFLICT DO NOTHING;

-- By trigger, so that what is changed by hand is noticed as well.
CREATE OR REPLACE FUNCTION {schema}.note_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('UPDATE %I.state SET changes = changes + 1, last_write = gen_random_uuid()', TG_TABLE_SCHEMA);
    PERFORM pg_notify('jwksd_' || TG_TABLE_SCHEMA, '');
    RETURN NULL;
END
$$;
DROP TRIGGER IF EXISTS note_change ON {schema}.documents;
CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON {schema}.documents
    FOR EACH ROW EXECUTE FUNCTION {schema}.note_change();
DROP TRIGGER IF EXISTS note_truncate ON {schema}.documents;
CREATE TRIGGER note_truncate AFTER TRUNCATE ON {schema}.documents
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.note_change();

-- Who runs, and what each shows.
CREATE TABLE IF NOT EXISTS {schema}.replicas (
    replica text PRIMARY KEY CHECK (octet_length(replica) <= 128),
    role text NOT NULL CHECK (octet_length(role) <= 32),
    version text NOT NULL CHECK (octet_length(version) <= 128),
    publishes boolean NOT NULL,
    generations jsonb NOT NULL,
    resumed jsonb NOT NULL DEFAULT '{}',
    reported_at timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS replicas_reported_at ON {schema}.replicas (reported_at);
