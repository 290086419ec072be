-- Give a client a new secret; the one that it replaces stays valid for a while.
--   $1  name                                  text
--   $2  hash of the new secret                text
--   $3  for how long the old one stays valid  int  (seconds)
update clients
set secret_hash = $2::text,
    previous_hash = secret_hash,
    previous_until = clock_timestamp() + $3::int * interval '1 second'
where name = $1::text
returning id as client_id, array_to_string(scopes, ' ') as scope, projects, previous_until as old_secret_valid_until
