-- What idempotency keys have bound: a row for each lock, in the order they were asked
-- for, without its user where the lock has ended.
--   $1  keys  uuid[]
select keys.key, keys.bound_id, locks.user_id, locks.fence, locks.lock_id, locks.acquired_at, locks.expires_at,
    locks.ttl, locks.holder, locks.note, users.login, users.secret, users.project_id, users.env, users.domain,
    users.labels
from (
    select key, bound_id, place
    from idempotency_keys
    cross join lateral unnest(lock_ids) with ordinality as bound (bound_id, place)
    where key = any($1::uuid[])
) as keys
left join lateral (
    select *
    from locks
    where lock_id = keys.bound_id
        and expires_at > clock_timestamp()
    offset 0  -- a look-up for each, see release_locks.sql
) as locks on true
left join users on users.id = locks.user_id
order by keys.key, keys.place
