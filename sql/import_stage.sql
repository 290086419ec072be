-- Where the lines of an import wait for its end. It goes with the transaction, also after a kill -9.
create temporary table import_rows (
    line integer not null,
    kind text not null,
    id uuid not null,
    project_id uuid not null,
    env text not null,
    domain text not null,
    login text not null,
    labels jsonb not null,
    secret text,
    has_codes boolean not null,
    code_key text,
    code_sealed bytea,
    code_period integer
) on commit drop
