-- Turn overtaken lines into updates of the users that now have their logins.
--   $1 staged ids  $2 user ids  $3 secrets, sealed for those
update pg_temp.import_rows
set kind = 'updated',
    id = adopted.id,
    secret = adopted.secret
from unnest($1::uuid[], $2::uuid[], $3::text[]) as adopted (staged_id, id, secret)
where import_rows.id = adopted.staged_id
