-- Run after every migration, for each of the roles that exists: {manager} and {signer}.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = '{manager}') THEN
        GRANT USAGE ON SCHEMA {schema} TO {manager};
        GRANT SELECT ON {schema}.migrations TO {manager};
        GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.documents TO {manager};
        GRANT SELECT, UPDATE ON {schema}.state TO {manager};
        GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.replicas TO {manager};
        -- What is in the audit table stays as it is.
        GRANT SELECT, INSERT ON {schema}.audit TO {manager};
    END IF;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = '{signer}') THEN
        GRANT USAGE ON SCHEMA {schema} TO {signer};
        GRANT SELECT ON {schema}.migrations, {schema}.documents, {schema}.state TO {signer};
        GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.replicas TO {signer};
    END IF;
END
$$;
