-- Make the pools that an import needs.
--   $1-$3  project ids uuid[], envs text[], domains text[]
-- Not in the transaction of the import: a call that moves a user to such a pool would wait for that one while it
-- holds the user that the import waits for. A pool without users is seen by nobody.
insert into pools (project_id, env, domain)
select *
from unnest($1::uuid[], $2::text[], $3::text[])
on conflict do nothing
