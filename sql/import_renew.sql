-- Turn lines whose users are gone into new users.
--   $1 lines  $2 new user ids  $3 secrets, sealed for those
update pg_temp.import_rows
set kind = 'created',
    id = renewed.id,
    secret = renewed.secret
from unnest($1::int[], $2::uuid[], $3::text[]) as renewed (line, id, secret)
where import_rows.line = renewed.line
