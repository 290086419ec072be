-- A known text sealed under each key in use, so that a wrong or a missing key is found at the start of
-- the service and not at the first lock. The keys themselves never enter the database.
create table sealing_keys (
    id text primary key,
    proof text not null,
    constraint "a proof is sealed" check (proof ~ '^\$aes-256-gcm\$')
);
