-- How locks ended that are no longer held, as far as it is remembered.
--   $1  lock ids  uuid[]
--   $2  client    uuid: whose locks they have to be; null: anybody's
select lock_id, ended_at, ended_by
from history
where lock_id = any($1::uuid[])
    and ($2::uuid is null or client_id = $2::uuid)
union all
select lock_id, expires_at, 'expired'
from locks
where lock_id = any($1::uuid[])
    and ($2::uuid is null or client_id = $2::uuid)
    and expires_at <= clock_timestamp()
