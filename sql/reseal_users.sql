-- Replace secrets, each only while it is still the one that was read.
--   $1  user ids     uuid[]
--   $2  old secrets  text[]
--   $3  new secrets  text[]
update users
set secret = resealed.new
from unnest($1::uuid[], $2::text[], $3::text[]) as resealed (id, old, new)
where users.id = resealed.id
    and users.secret = resealed.old
returning users.id
