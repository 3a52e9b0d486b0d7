-- The records' journals, which are bounded, kept for good. Rows are added in the transaction that writes the record.

CREATE TABLE IF NOT EXISTS {schema}.audit (
    lineage text NOT NULL,
    -- '': the installation as a whole
    keyset text NOT NULL,
    seq bigint NOT NULL,
    at timestamptz NOT NULL,
    action text NOT NULL,
    actor text NOT NULL,
    reason text,
    kids text[] NOT NULL,
    detail text,
    PRIMARY KEY (lineage, keyset, seq)
);
CREATE INDEX IF NOT EXISTS audit_at ON {schema}.audit (at);
