-- Users whose password is sealed under another than the first key, by id.
--   $1  id of the last user seen           uuid
--   $2  how sealed secrets begin           text
--   $3  how those of the first key begin   text
--   $4  how many                           int
select id, secret
from users
where id > $1::uuid
    and starts_with(secret, $2::text)
    and not starts_with(secret, $3::text)
order by id
limit $4::int
