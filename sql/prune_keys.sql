-- Forget idempotency keys whose locks are all forgotten.
--   $1  days to remember      int
--   $2  how many at the most  int
delete from idempotency_keys
where key in (
    select key
    from idempotency_keys
    where bound_at < clock_timestamp() - $1::int * interval '1 day'
        and not exists (select from history where lock_id = any(lock_ids))
        and not exists (select from locks where lock_id = any(lock_ids))
    order by bound_at
    limit $2::int
)
