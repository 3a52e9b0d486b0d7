-- The least that each part of jwksd needs. Run it once as a superuser (or a role with CREATEROLE and CREATE on the
-- database), connected to jwksd's database:
--
--     psql --dbname jwksd --file deploy/postgres/roles.sql
--
-- then give each role that logs in a password (\password jwksd_owner in psql asks for it and sends only its hash), and run
-- `jwksd init` with the owner's URL: it makes the tables and grants what the other two need, after every upgrade anew.
-- Another schema: replace jwksd by its name everywhere; the roles' names are SCHEMA_manager and SCHEMA_signer.

-- Makes and migrates the tables; for `jwksd init` only.
CREATE ROLE jwksd_owner LOGIN;
-- Reads and writes documents, adds to the audit table, cannot change what is in it: replicas with role `all` or `manager`.
CREATE ROLE jwksd_manager LOGIN;
-- Reads documents and tells of itself: replicas with role `signer`.
CREATE ROLE jwksd_signer LOGIN;

CREATE SCHEMA jwksd AUTHORIZATION jwksd_owner;
